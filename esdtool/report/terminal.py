"""Tables on stdout, with rich: the modules, alpha by role and by depth, what was skipped, and the conclusion."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from esdtool.analysis import Analysis, ModuleResult
from esdtool.checkpoint.base import dimensions
from esdtool.modules.base import NORM_OR_BIAS
from esdtool.options import Experts
from esdtool.report.experts import fold_experts, starred
from esdtool.report.verdict import closing_words, verdict

if TYPE_CHECKING:
    from esdtool.engine import Plan
    from esdtool.modules import WeightModule
    from esdtool.trajectory import Trajectory

_NARROW = 128
"""Below so many columns the table keeps to the essentials."""

_PIPE_WIDTH = 240
"""Columns when stdout is a file or a pipe: nothing is cut."""

_COLOURS = {
    "heavy-tailed": "green",
    "like random": "yellow",
    "lighter than random": "yellow",
    "over-trained": "red",
    "under-trained": "yellow",
}

_SORT: dict[str, Callable[[ModuleResult], Any]] = {
    "name": lambda module: module.name,
    "role": lambda module: module.role,
    "layer": lambda module: -1 if module.layer is None else module.layer,
    "alpha": lambda module: module.alpha,
    "ks": lambda module: module.ks_distance,
    "stable-rank": lambda module: module.stable_rank,
    "lambda-max": lambda module: module.lambda_max,
}


def new_table(title: str) -> Table:
    """A table in the house style: no rules but the one below the headings, so that it pastes well and stays narrow."""
    # As a Text it is neither wrapped at the table's width nor read as markup.
    heading = Text(title, style="bold", no_wrap=True, overflow="ignore")
    return Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def stdout_console() -> Console:
    """A console on stdout that never truncates what goes into a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def print_analysis(
    analysis: Analysis,
    *,
    sort: str = "order",
    top: int | None = None,
    experts: Experts = "mean",
    sparklines: bool = False,
    console: Console | None = None,
) -> None:
    """Everything a person wants to see of an analysis, on stdout unless a console is given."""
    console = console or stdout_console()
    console.print(_modules(analysis, sort=sort, top=top, experts=experts, narrow=console.width < _NARROW))
    if analysis.summary.by_role:
        console.print(_roles(analysis))
    if len(analysis.summary.by_layer) > 1:
        console.print(_layers(analysis))
    if analysis.skipped:
        console.print(_skipped((tensor.reason, tensor.name) for tensor in analysis.skipped))
    console.print(Text(closing_words(analysis)))


def print_plan(plan: Plan) -> None:
    """What `--dry-run` shows: modules, and what they will cost."""
    from esdtool.calibration import estimate_seconds

    console = stdout_console()
    table = new_table(f"{plan.checkpoint.location}: {len(plan.selection.modules)} weight modules")
    for heading in ("module", "role", "layer", "shape", "dtype", "eigenvalues"):
        table.add_column(heading, justify="left" if heading in ("module", "role", "dtype") else "right")
    rows: dict[str, list[WeightModule]] = {}
    for module in plan.selection.modules:
        rows.setdefault(starred(module.name, module.expert), []).append(module)
    for name, (module, *others) in rows.items():
        table.add_row(
            escape(name if module.expert is None else f"{name} ({1 + len(others)})"),
            escape(module.role),
            _layer(module.layer),
            dimensions(module.shape),
            module.dtype,
            str(module.num_eigs),
        )
    console.print(table)
    if plan.selection.skipped:
        console.print(_skipped((tensor.reason, tensor.name) for tensor in plan.selection.skipped))
    seconds = estimate_seconds(plan)
    console.print(
        f"Estimated: {_duration(seconds)} on {plan.device} with {plan.jobs} at a time, "
        f"{plan.peak_bytes / 2**20:,.0f} MiB for the matrices in flight."
    )


def print_trajectory(trajectory: Trajectory, *, sparklines: bool = False, console: Console | None = None) -> None:
    """Alpha by role over the steps, and each checkpoint in a sentence."""
    console = console or stdout_console()
    table = new_table("alpha by role over the checkpoints")
    table.add_column("checkpoint", overflow="fold")
    for heading in ("mean", *trajectory.roles):
        table.add_column(Text(heading), justify="right")
    for step in trajectory.steps:
        alphas = [step.mean_alpha, *(step.alpha_by_role.get(role) for role in trajectory.roles)]
        table.add_row(Text(step.checkpoint), *(format_number(alpha, ".3f") for alpha in alphas))
    console.print(table)
    for analysis in trajectory.analyses:
        console.print(Text(f"{analysis.source.checkpoint}: {closing_words(analysis)}"))


def _modules(analysis: Analysis, *, sort: str, top: int | None, experts: Experts, narrow: bool) -> Table:
    fit = analysis.settings.fit
    modules = list(analysis.modules) if experts == "all" else fold_experts(analysis.modules)
    if sort != "order":
        key = _SORT[sort]
        # Modules without a number come last in any order.
        modules.sort(key=lambda module: (key(module) is None, key(module) if key(module) is not None else 0))
    shown = modules if top is None else modules[:top]
    title = f"{_subject(analysis)}: alpha by {fit[0]}"
    if len(modules) < len(analysis.modules):
        title += ", experts averaged by layer"
    if len(shown) < len(modules):
        title += f", {len(shown)} of {len(modules)} modules"
    table = new_table(title)
    columns = _columns(analysis, narrow=narrow)
    for heading, _ in columns:
        is_text = heading in ("module", "role", "verdict")
        table.add_column(
            heading,
            justify="left" if is_text else "right",
            no_wrap=heading not in ("module", "verdict"),
            overflow="fold",
        )
    for module in shown:
        table.add_row(*(cell(module) for _, cell in columns))
    return table


def _subject(analysis: Analysis) -> str:
    """What was analysed, for a title."""
    source = analysis.source
    if source.base is not None:
        return f"{source.checkpoint} minus {source.base}"
    return source.checkpoint


def _columns(analysis: Analysis, *, narrow: bool) -> list[tuple[str, Callable[[ModuleResult], str | Text]]]:
    """Heading and cell of each column."""
    fit = analysis.settings.fit

    def words(module: ModuleResult) -> Text:
        said = verdict(module, fit[0])
        return Text(said, style=_COLOURS.get(said, "red" if not module.ok else ""))

    def other(name: str) -> Callable[[ModuleResult], str]:
        return lambda module: format_number(module.alphas.get(name), ".3f")

    place: list[tuple[str, Callable[[ModuleResult], str | Text]]] = [
        ("role", lambda module: escape(module.role)),
        ("layer", lambda module: _layer(module.layer)),
    ]
    rest: list[tuple[str, Callable[[ModuleResult], str | Text]]] = [
        ("KS", lambda module: format_number(module.ks_distance, ".3f")),
        ("stable rank", lambda module: format_number(module.stable_rank, ".1f")),
        ("lambda_max", lambda module: format_number(module.lambda_max, ".4g")),
    ]
    return [
        ("module", lambda module: escape(module.name)),
        *([] if narrow else place),
        ("shape", lambda module: dimensions(module.shape)),
        ("alpha", lambda module: format_number(module.alpha, ".3f")),
        ("+-", lambda module: format_number(module.alpha_stderr, ".2f")),
        *((name, other(name)) for name in fit[1:]),
        ("null", lambda module: format_number(module.mp_alpha, ".2f")),
        *([] if narrow else rest),
        ("verdict", words),
    ]


def _roles(analysis: Analysis) -> Table:
    table = new_table("alpha by role")
    table.add_column("role")
    for heading in ("modules", "mean", "spread", "min", "max", "null"):
        table.add_column(heading, justify="right")
    table.add_column("")
    low, high = _bar_range([row.mean_alpha for row in analysis.summary.by_role])
    for row in analysis.summary.by_role:
        table.add_row(
            escape(row.role),
            str(row.count),
            f"{row.mean_alpha:.3f}",
            f"{row.std_alpha:.3f}",
            f"{row.min_alpha:.3f}",
            f"{row.max_alpha:.3f}",
            format_number(row.mean_mp_alpha, ".3f"),
            _bar(row.mean_alpha, low, high),
        )
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


def _skipped(tensors: Iterable[tuple[str, str]]) -> Table:
    """Every skipped tensor and why. Those that differ only in an index share a line, as do all norms and biases."""
    groups: dict[tuple[str, str], list[str]] = {}
    for reason, name in tensors:
        pattern = "" if reason == NORM_OR_BIAS else re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        groups.setdefault((reason, pattern), []).append(name)
    table = new_table(f"skipped: {sum(len(names) for names in groups.values())} tensors")
    table.add_column("tensors", justify="right")
    table.add_column("name", overflow="fold")
    table.add_column("reason")
    for (reason, pattern), names in sorted(groups.items(), key=lambda group: group[0][0] == NORM_OR_BIAS):
        shown = names[0] if len(names) == 1 else pattern or "(--json lists them)"
        table.add_row(str(len(names)), escape(shown), escape(reason))
    return table


def format_number(value: float | None, spec: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, spec)


def _layer(layer: int | None) -> str:
    return "-" if layer is None else str(layer)


def _bar_range(values: list[float]) -> tuple[float, float]:
    """Ends of the bars: from a little below the smallest, so that differences show, to the largest."""
    low, high = min(values), max(values)
    return low - 0.15 * (high - low) - 1e-12, high


def _bar(value: float, low: float, high: float, width: int = 20) -> str:
    filled = 1 if high <= low else max(1, round(width * (value - low) / (high - low)))
    return "█" * filled


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "under a second"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
