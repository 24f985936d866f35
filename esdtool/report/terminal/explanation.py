"""Plain lines on stdout that say what becomes of single tensors, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esdtool.modules.explain import explain
from esdtool.support.terminal import say

if TYPE_CHECKING:
    from esdtool.analysis.plan import Plan


def print_explanations(plan: Plan, pattern: str) -> None:
    """Print an explanation for each tensor of a plan whose name, or whose modules' names, match.

    Args:
        plan: what an analysis would do.
        pattern: a regular expression.

    Raises:
        UsageError: if the expression is none or matches nothing.
    """
    for explanation in explain(plan.checkpoint.tensors, plan.selection, pattern):
        for line in explanation.lines:
            say(line)
