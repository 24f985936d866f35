"""Draw what `esdtool watch` has seen so far."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esdtool.report.tables.analysis import format_number
from esdtool.report.tables.findings import findings_of, headline
from esdtool.report.terminal.analysis import trends
from esdtool.report.terminal.console import new_table
from esdtool.report.terminal.findings import print_findings
from esdtool.support.terminal import new_console, styled
from esdtool.support.words import counted

if TYPE_CHECKING:
    from rich.console import Console

    from esdtool.analysis.document import Analysis
    from esdtool.comparison.trajectory import Trajectory

_ROWS = 12
"""Checkpoints in the table; the courses of the roles show all."""


def print_watch(trajectory: Trajectory, *, clear: bool = False, console: Console | None = None) -> None:
    """Print the last checkpoints, each role's course over all of them, and the findings in the last one.

    Args:
        trajectory: at least one checkpoint.
        clear: wipe the terminal first.
        console: where; default stdout.
    """
    console = console or new_console()
    if clear:
        console.clear()
    shown = trajectory.steps[-_ROWS:]
    left_out = len(trajectory.steps) - len(shown)
    some = f", the last {_ROWS}" if left_out else ""
    table = new_table(f"alpha by role: {counted(len(trajectory.steps), 'checkpoint')}{some}")
    table.add_column("checkpoint", overflow="fold")
    for heading in ("mean", *trajectory.roles):
        table.add_column(styled(heading), justify="right")
    for step in shown:
        alphas = [step.mean_alpha, *(step.alpha_by_role.get(role) for role in trajectory.roles)]
        table.add_row(styled(step.checkpoint), *(format_number(alpha, ".3f") for alpha in alphas))
    console.print(table)
    if len(trajectory.steps) > 1 and trajectory.roles:
        console.print(trends(trajectory, console))
    print_findings(trajectory.analyses[-1], console)


def news(analysis: Analysis) -> str:
    """Say in a line what a new checkpoint brought."""
    mean = analysis.summary.mean_alpha
    words = f"{analysis.source.checkpoint}: "
    words += "no module could be scored" if mean is None else f"mean alpha {mean:.3f}"
    found = findings_of(analysis)
    return words + "".join(f"; {finding.severity.value} {finding.rule}: {headline(finding)}" for finding in found[:2])
