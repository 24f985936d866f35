"""A weight-decay assignment in the terminal: every decay, and the paper's picture of decay by layer and role."""

from __future__ import annotations

from statistics import fmean

from rich.console import Console
from rich.table import Table

from esdtool.assignment.check import CheckReport
from esdtool.assignment.document import Assignment, Entry
from esdtool.assignment.remarks import mean_decay
from esdtool.report.tables.analysis import format_number
from esdtool.report.terminal.console import new_table
from esdtool.support.numbers import aligned
from esdtool.support.terminal import new_console, styled
from esdtool.support.words import dimensions

_BAR_WIDTH = 24
_SHADES = ("grey35", "deep_sky_blue4", "deep_sky_blue3", "green3", "yellow3", "orange1", "orange_red1")
"""From weak to strong decay."""


def print_assignment(assignment: Assignment, *, console: Console | None = None) -> None:
    """The table of decays, the picture, and what the file says of everything else."""
    console = console or new_console()
    console.print(_modules(assignment))
    picture = _picture(assignment)
    if picture is not None:
        console.print(picture)
    console.print(styled(_closing_words(assignment)))


def print_check(report: CheckReport, *, path: str, model: str) -> None:
    """Print the result of `assign --check`."""
    console = new_console()
    table = new_table(f"{path} against {model}")
    table.add_column("parameter", overflow="fold")
    table.add_column("finding")
    for name in report.unknown:
        table.add_row(styled(name), styled("in the file, not in the model", style="red"))
    for name, listed, found in report.wrong_shape:
        words = f"{dimensions(listed)} in the file, {dimensions(found)} in the model"
        table.add_row(styled(name), styled(words, style="red"))
    for name in report.uncovered:
        table.add_row(styled(name), styled("in the model, not in the file", style="red"))
    if table.row_count:
        console.print(table)
    console.print(
        f"{len(report.matched)} parameters match in name and shape; {report.unlisted} others fall under the default."
    )


def _modules(assignment: Assignment) -> Table:
    method = assignment.method
    title = f"weight decay, base {assignment.base_weight_decay:g}"
    if method is not None:
        title += f", {method.assign} in {method.score}" + (f" by {method.fit}" if method.fit else "")
    table = new_table(title)
    table.add_column("parameter", overflow="fold", min_width=12)
    for heading in ("alpha", "ratio", "decay"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    largest = max((entry.weight_decay for entry in assignment.parameters.values()), default=0.0)
    decays = [entry.weight_decay for entry in assignment.parameters.values()]
    shown = dict(zip(assignment.parameters, aligned(decays, digits=4), strict=True))
    for name, entry in assignment.parameters.items():
        filled = round(_BAR_WIDTH * entry.weight_decay / largest) if largest > 0 else 0
        bar = styled("▏", style="grey50")  # the origin, which a decay of 0 shows alone
        bar.append_text(styled("█" * filled, style=_shade(entry, largest)))
        if entry.note:
            bar.append_text(styled(f" {entry.note}", "yellow"))
        table.add_row(
            styled(name),
            format_number(entry.alpha, ".3f"),
            format_number(entry.ratio, ".3f"),
            shown[name],
            bar,
        )
    return table


def _picture(assignment: Assignment) -> Table | None:
    """Decay by layer (down) and role (across), as in the paper; None without numbered layers."""
    cells: dict[tuple[int, str], list[Entry]] = {}
    for entry in assignment.parameters.values():
        if entry.layer is not None and entry.role is not None:
            cells.setdefault((entry.layer, entry.role), []).append(entry)
    if not cells:
        return None
    roles = list(dict.fromkeys(role for _, role in cells))
    largest = max(entry.weight_decay for entries in cells.values() for entry in entries)
    means = {key: fmean(entry.weight_decay for entry in entries) for key, entries in cells.items()}
    shown = dict(zip(means, aligned(list(means.values())), strict=True))
    table = new_table("decay by layer and role")
    table.add_column("layer", justify="right")
    for role in roles:
        table.add_column(styled(role), justify="right")
    for layer in sorted({layer for layer, _ in cells}):
        row = []
        for role in roles:
            entries = cells.get((layer, role))
            if entries is None:
                row.append(styled("-"))
                continue
            shade = _shade(entries[0].model_copy(update={"weight_decay": means[layer, role]}), largest)
            row.append(styled(f"{shown[layer, role]} ■", style=shade))
        table.add_row(str(layer), *row)
    return table


def _closing_words(assignment: Assignment) -> str:
    decays = [entry.weight_decay for entry in assignment.parameters.values()]
    default = assignment.default.weight_decay
    others = "keep the trainer's own decay" if default is None else f"get {default:g}"
    kind = "decoupled (AdamW)" if assignment.optimizer == "decoupled" else "L2 (Adam)"
    return (
        f"{len(decays)} parameters, decays {min(decays):.4g} to {max(decays):.4g}, {kind}; mean decay over their "
        f"weights {mean_decay(assignment):.4g}, base {assignment.base_weight_decay:g}. All others {others}."
    )


def _shade(entry: Entry, largest: float) -> str:
    if largest <= 0:
        return _SHADES[0]
    return _SHADES[min(int(entry.weight_decay / largest * len(_SHADES)), len(_SHADES) - 1)]
