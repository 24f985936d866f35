"""What becomes of single tensors, and why, as plain lines on stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from esdtool.modules.explain import explain
from esdtool.report.terminal.console import stdout_console

if TYPE_CHECKING:
    from esdtool.analysis.plan import Plan


def print_explanations(plan: Plan, pattern: str, *, console: Console | None = None) -> None:
    """Print an explanation for each tensor of a plan whose name, or whose modules' names, match.

    Args:
        plan: what an analysis would do.
        pattern: a regular expression.
        console: where to print; stdout by default.

    Raises:
        UsageError: if the expression is none or matches nothing.
    """
    console = console or stdout_console()
    for explanation in explain(plan.checkpoint.tensors, plan.selection, pattern):
        for line in explanation.lines:
            console.print(Text(line), soft_wrap=True)
