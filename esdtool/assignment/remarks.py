"""Say what a user should know before trusting an assignment: alphas that tell nothing, and a total decay far away."""

from __future__ import annotations

import math

from esdtool.analysis.document import Analysis
from esdtool.analysis.verdict import Verdict, verdict
from esdtool.assignment.document import Assignment, Entry

_FAR = 2.0
"""Factor between mean and base decay from which on a user may take the total for the effect of its distribution."""

_LIKE_RANDOM = frozenset({Verdict.LIKE_RANDOM, Verdict.LIGHTER_THAN_RANDOM})


def mean_decay(assignment: Assignment) -> float:
    """Return the mean decay of the assigned parameters, weighted by their numbers of elements."""
    entries = assignment.parameters.values()
    sizes = [_size(entry) for entry in entries]
    return math.fsum(entry.weight_decay * size for entry, size in zip(entries, sizes, strict=True)) / sum(sizes)


def geometry_remark(analysis: Analysis, assignment: Assignment) -> str | None:
    """Warn where half of the modules or more are like random: their alphas tell their shapes. None otherwise.

    Args:
        analysis: that the assignment was made from.
        assignment: by alpha or by another score.
    """
    method = assignment.method
    if method is None or method.fit is None or method.name == "uniform":
        return None
    assigned = [module for module in analysis.scored if module.parameter not in assignment.left_out]
    random = sum(verdict(module, method.fit) in _LIKE_RANDOM for module in assigned)
    if not assigned or 2 * random < len(assigned):
        return None
    return (
        f"alphas here are mostly geometry: {random} of {len(assigned)} modules are like random matrices of their "
        "shapes, so the decays follow the shapes, not what was learnt"
    )


def total_remark(assignment: Assignment) -> str | None:
    """Warn where the mean decay is less than half of the base or more than twice; None otherwise."""
    mean, base = mean_decay(assignment), assignment.base_weight_decay
    if base <= 0 or 1 / _FAR < mean / base < _FAR:
        return None
    return (
        f"the mean decay is {mean:.3g}, {mean / base:.2g} times the base of {base:g}: in a comparison with uniform "
        "decay this difference in total counts, too; --normalize keeps the mean at the base"
    )


def _size(entry: Entry) -> int:
    return math.prod(entry.shape) if entry.shape else 1
