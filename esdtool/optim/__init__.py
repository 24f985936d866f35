"""Weight decays and learning rates on a live model: from a file once, or by a schedule. Needs torch only."""

from __future__ import annotations

from esdtool.assignment.document import Assignment, load_assignment
from esdtool.names import canonical_name
from esdtool.optim.alpha_decay import AlphaDecay
from esdtool.optim.layerwise_lr import LayerwiseLR
from esdtool.optim.static import Report, apply, param_groups

__all__ = [
    "AlphaDecay",
    "Assignment",
    "LayerwiseLR",
    "Report",
    "apply",
    "canonical_name",
    "load_assignment",
    "param_groups",
]
