"""Adapters as checkpoints: the updates of weights that LoRA and its relatives store as factors.

The parts of a module's update are found by their names (`names`), a kind makes the update of them (`kinds`, one file
each), and `checkpoint` lists the updates, or, where the base weights are in the same file, the sums that act. `merged`
adds an adapter to a base that lies elsewhere.
"""

from __future__ import annotations

from esdtool.checkpoint.adapters.checkpoint import AdapterCheckpoint, adapter_weights, is_adapter
from esdtool.checkpoint.adapters.merged import MergedCheckpoint, merged

__all__ = ["AdapterCheckpoint", "MergedCheckpoint", "adapter_weights", "is_adapter", "merged"]
