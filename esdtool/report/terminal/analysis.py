"""Tables on stdout, with rich: the modules, alpha by role and by depth, what was skipped, and the conclusion."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from esdtool.analysis.document import Analysis
from esdtool.analysis.module_record import ModuleResult
from esdtool.analysis.verdict import Verdict, alpha_words, closing_words, distance_words, verdict
from esdtool.checkpoint.remote.path import RemotePath
from esdtool.report.tables.analysis import (
    ROLE_COLUMNS,
    Column,
    Skipped,
    doubt,
    format_layer,
    format_number,
    module_columns,
    module_rows,
    skipped_rows,
)
from esdtool.report.tables.experts import Experts, starred
from esdtool.report.tables.means import MEAN_COLUMNS, MEANS_TITLE, mean_rows
from esdtool.report.tables.settings import left_to_files
from esdtool.report.terminal.console import left_out_words, new_table
from esdtool.report.terminal.findings import print_findings
from esdtool.report.terminal.heads import print_heads
from esdtool.report.terminal.heatmap import alpha_heat_map
from esdtool.report.terminal.sparkline import ESD_BINS, esd_sparkline, esds_of_rows, ramp_for, shortened, sparkline
from esdtool.report.terminal.vectors import print_vectors
from esdtool.support.sizes import format_size
from esdtool.support.terminal import new_console, styled
from esdtool.support.words import dimensions, duration

if TYPE_CHECKING:
    from esdtool.analysis.plan import Plan
    from esdtool.comparison.trajectory import Trajectory
    from esdtool.modules import WeightModule

_NARROW = 128
"""Below so many columns the table keeps to the essentials."""

_VERY_NARROW = 100
"""Below so many columns a table with sparklines keeps to less."""

_TREND = 30
"""Longest sparkline over steps."""

_COLOURS = {
    Verdict.HEAVY_TAILED: "green",
    Verdict.LIKE_RANDOM: "yellow",
    Verdict.LIGHTER_THAN_RANDOM: "yellow",
    Verdict.OVER_TRAINED: "red",
    Verdict.UNDER_TRAINED: "yellow",
    Verdict.NOT_SCORED: "red",
}


def print_analysis(
    analysis: Analysis,
    *,
    sort: str = "order",
    top: int | None = None,
    experts: Experts = "mean",
    sparklines: bool = False,
    console: Console | None = None,
) -> None:
    """Everything a person wants to see of an analysis, on stdout unless a console is given.

    With `sparklines` each row shows the module's ESD, and a heat map follows. Rows of averaged experts show the
    eigenvalues of all of them.
    """
    console = console or new_console()
    print_findings(analysis, console)
    if sparklines and not analysis.esds:
        console.print("No sparklines: the analysis carries no eigenvalues; analyse the checkpoint itself.")
    console.print(
        _modules(
            analysis,
            sort=sort,
            top=top,
            experts=experts,
            sparklines=sparklines and bool(analysis.esds),
            console=console,
        )
    )
    if analysis.summary.by_role:
        console.print(_roles(analysis))
    if len(analysis.summary.by_layer) > 1:
        console.print(_layers(analysis))
    if analysis.summary.means and analysis.scored:
        console.print(_means(analysis))
    if sparklines:
        for part in alpha_heat_map(analysis, console):
            console.print(part)
    print_vectors(analysis, console)
    print_heads(analysis, console)
    if analysis.skipped:
        console.print(_skipped(analysis.skipped))
    console.print(styled(closing_words(analysis)))


def print_plan(plan: Plan) -> None:
    """Print the result of `--dry-run`: modules, and their expected cost."""
    from esdtool.analysis.timing import ACCELERATORS, at_best, estimate_seconds, faster_choice

    console = new_console()
    table = new_table(f"{plan.checkpoint.location}: {len(plan.selection.modules)} weight modules")
    doubtful = any(map(doubt, plan.selection.modules))
    for heading in (
        "module",
        "role",
        "layer",
        "shape",
        "dtype",
        "eigenvalues",
        *(["identified by"] if doubtful else []),
    ):
        is_text = heading in ("module", "role", "dtype", "identified by")
        table.add_column(heading, justify="left" if is_text else "right")
    rows: dict[str, list[WeightModule]] = {}
    for module in plan.selection.modules:
        rows.setdefault(starred(module.name, module.expert), []).append(module)
    for name, (module, *others) in rows.items():
        table.add_row(
            styled(name if module.expert is None else f"{name} ({1 + len(others)})"),
            styled(module.role),
            format_layer(module.layer),
            dimensions(module.shape),
            styled(module.dtype),
            str(module.num_eigs),
            *([doubt(module)] if doubtful else []),
        )
    console.print(table)
    if plan.selection.skipped:
        console.print(_skipped(plan.selection.skipped))
    seconds = estimate_seconds(plan)
    console.print(
        f"Estimated: {duration(seconds)} on {plan.device} with {plan.jobs} at a time, "
        f"{format_size(plan.peak_bytes)} for the matrices in flight."
    )
    folder, fetched = plan.checkpoint.folder, plan.bytes_to_fetch
    if fetched is not None and isinstance(folder, RemotePath):
        console.print(
            f"To fetch: {fetched:,} bytes ({format_size(fetched)}) of {format_size(folder.store.opened_bytes)}, "
            "but for spectra that are in the cache."
        )
    hint = faster_choice(plan, seconds)
    if hint is not None:
        console.print(styled(hint[0].upper() + hint[1:] + "."))
    if plan.device.type == "cpu":
        gpus = [f"{gpu.name} {duration(at_best(plan.selection.modules, gpu))}" for gpu in ACCELERATORS]
        console.print(f"On a GPU at best, by its data sheet: {', '.join(gpus)}.")


def print_trajectory(trajectory: Trajectory, *, sparklines: bool = False, console: Console | None = None) -> None:
    """Alpha by role over the steps, and each checkpoint in a sentence; with `sparklines` each role's course."""
    console = console or new_console()
    if any(analysis.findings for analysis in trajectory.analyses):
        console.print(styled(f"Findings in the last checkpoint, {trajectory.analyses[-1].source.checkpoint}:"))
        print_findings(trajectory.analyses[-1], console)
    table = new_table("alpha by role over the checkpoints")
    table.add_column("checkpoint", overflow="fold")
    for heading in ("mean", *trajectory.roles):
        table.add_column(styled(heading), justify="right")
    for step in trajectory.steps:
        alphas = [step.mean_alpha, *(step.alpha_by_role.get(role) for role in trajectory.roles)]
        table.add_row(styled(step.checkpoint), *(format_number(alpha, ".3f") for alpha in alphas))
    console.print(table)
    if sparklines:
        console.print(trends(trajectory, console))
    for analysis in trajectory.analyses:
        console.print(styled(f"{analysis.source.checkpoint}: {closing_words(analysis)}"))
    elsewhere = left_to_files(trajectory.analyses[-1].settings)
    if elsewhere is not None:
        console.print(elsewhere)


def _modules(
    analysis: Analysis, *, sort: str, top: int | None, experts: Experts, sparklines: bool, console: Console
) -> Table:
    found = module_rows(analysis, sort=sort, top=top, experts=experts)
    columns = module_columns(analysis, narrow=console.width < _NARROW)
    if sparklines and console.width < _VERY_NARROW:
        columns = [column for column in columns if column.heading in ("module", "alpha")]
        columns.append(Column(heading="verdict", cell=partial(_short_verdict, analysis=analysis), is_text=True))
    left_out = left_out_words(module_columns(analysis, narrow=False), columns, console, elsewhere="--csv")
    esds = esds_of_rows(analysis, found.rows) if sparklines else {}
    table = new_table(found.title)
    for column in columns:
        table.add_column(
            styled(column.heading),
            justify="left" if column.is_text else "right",
            no_wrap=column.heading not in ("module", "verdict"),
            overflow="fold",
        )
        if sparklines and column.heading == "module":
            table.add_column("ESD, | tail", no_wrap=True, min_width=ESD_BINS + 1)
    table.caption = left_out
    ramp = ramp_for(console.encoding)
    for module in found.rows:
        cells = [styled(column.cell(module), style=_style(module, column.heading, analysis)) for column in columns]
        if sparklines:
            esd = esds.get(module.name)
            cells.insert(1, styled("-") if esd is None else esd_sparkline(*esd, ramp=ramp))
        table.add_row(*cells)
    return table


def _short_verdict(module: ModuleResult, *, analysis: Analysis) -> str:
    """Say how far a module is from random, or what its alpha says where that is not known."""
    return distance_words(module) or alpha_words(module, analysis.settings.fit[0])


def _style(module: ModuleResult, heading: str, analysis: Analysis) -> str:
    if heading != "verdict":
        return ""
    return _COLOURS.get(verdict(module, analysis.settings.fit[0]), "")


def _roles(analysis: Analysis) -> Table:
    table = new_table("alpha by role")
    for column in ROLE_COLUMNS:
        table.add_column(column.heading, justify="left" if column.is_text else "right")
    table.add_column("")
    low, high = _bar_range([row.mean_alpha for row in analysis.summary.by_role])
    for row in analysis.summary.by_role:
        table.add_row(*(styled(column.cell(row)) for column in ROLE_COLUMNS), _bar(row.mean_alpha, low, high))
    return table


def _means(analysis: Analysis) -> Table:
    table = new_table(MEANS_TITLE)
    for column in MEAN_COLUMNS:
        table.add_column(column.heading, justify="left" if column.is_text else "right")
    for row in mean_rows(analysis):
        table.add_row(*(column.cell(row) for column in MEAN_COLUMNS))
    return table


def trends(trajectory: Trajectory, console: Console) -> Table:
    """Return the course of each role's mean alpha, on a scale of its own."""
    table = new_table("alpha over the steps, each role on its own scale")
    table.add_column("role", overflow="fold")
    for heading in ("first", "", "last", "change"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    steps = [step.alpha_by_role for step in trajectory.steps]
    ramp = ramp_for(console.encoding)
    for role in trajectory.roles:
        known = [step[role] for step in steps if role in step]
        line = sparkline(shortened([step.get(role) for step in steps], _TREND), ramp=ramp)
        change = f"{known[-1] - known[0]:+.3f}"
        table.add_row(styled(role), f"{known[0]:.3f}", line, f"{known[-1]:.3f}", change)
    return table


def _layers(analysis: Analysis) -> Table:
    table = new_table("alpha by depth")
    table.add_column("layer", justify="right")
    table.add_column("modules", justify="right")
    table.add_column("mean", justify="right")
    table.add_column("")
    low, high = _bar_range([row.mean_alpha for row in analysis.summary.by_layer])
    for row in analysis.summary.by_layer:
        table.add_row(str(row.layer), str(row.count), f"{row.mean_alpha:.3f}", _bar(row.mean_alpha, low, high))
    return table


def _skipped(tensors: Iterable[Skipped]) -> Table:
    rows = skipped_rows(tensors)
    table = new_table(f"skipped: {sum(count for count, _, _ in rows)} tensors")
    table.add_column("tensors", justify="right")
    table.add_column("name", overflow="fold")
    table.add_column("reason")
    for count, name, reason in rows:
        table.add_row(str(count), styled(name), styled(reason))
    return table


def _bar_range(values: list[float]) -> tuple[float, float]:
    """Ends of the bars: from a little below the smallest, so that differences show, to the largest."""
    low, high = min(values), max(values)
    return low - 0.15 * (high - low) - 1e-12, high


def _bar(value: float, low: float, high: float, width: int = 20) -> str:
    filled = 1 if high <= low else max(1, round(width * (value - low) / (high - low)))
    return "█" * filled
