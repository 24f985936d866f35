"""Weight decays on a live model: a wd.json applied once, or AlphaDecay's schedule. Needs torch only."""

from __future__ import annotations

from esdtool.assignment.document import Assignment, load_assignment
from esdtool.names import canonical_name
from esdtool.optim.alpha_decay import AlphaDecay
from esdtool.optim.static import Report, apply, param_groups

__all__ = ["AlphaDecay", "Assignment", "Report", "apply", "canonical_name", "load_assignment", "param_groups"]
