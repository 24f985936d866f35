"""Quantities that follow spectra besides weight decay, one file each.

Every module of this package defines `QUANTITY`, an `esdtool.assignment.quantity.Quantity`, and is found by itself:
`lora_rank.py` is `--for lora-rank`. Names come from the files, so that the command line knows them without an import.
"""

from __future__ import annotations

import pkgutil

WEIGHT_DECAY = "weight-decay"
"""The quantity of AlphaDecay, which has options of its own and, alone, a file of version 1."""

QUANTITY_NAMES = (
    WEIGHT_DECAY,
    *sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)),
)
"""The names of all quantities."""
