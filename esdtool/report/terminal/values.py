"""Show an assignment of several quantities in the terminal: the values of each parameter, and a summary of each."""

from __future__ import annotations

import math

from rich.console import Console

from esdtool.assignment.allocation import Allocation
from esdtool.assignment.fused import weighted_mean
from esdtool.report.tables.analysis import format_number
from esdtool.report.terminal.console import new_table
from esdtool.support.terminal import new_console, styled
from esdtool.support.words import dimensions


def print_allocation(allocation: Allocation, *, console: Console | None = None) -> None:
    """Print the table of values, and how many are chosen, or the range and the mean weighted by size."""
    console = console or new_console()
    methods = ", ".join(f"{name} ({record.method})" for name, record in allocation.quantities.items())
    table = new_table(methods)
    table.add_column("parameter", overflow="fold", min_width=12)
    for key in allocation.keys:
        table.add_column(key, justify="right", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    for name, entry in allocation.parameters.items():
        cells = [_cell(getattr(entry, key)) for key in allocation.keys]
        table.add_row(styled(name), *cells, "" if entry.shape is None else dimensions(entry.shape))
    console.print(table)
    for key in allocation.keys:
        values = allocation.values(key)
        if all(isinstance(value, bool) for value in values.values()):
            console.print(styled(f"{key}: {sum(values.values())} of {len(values)} parameters"))
            continue
        sizes = [math.prod(allocation.parameters[name].shape or ()) for name in values]
        mean = weighted_mean([float(value) for value in values.values()], sizes)
        words = f"{key}: {len(values)} parameters, {min(values.values()):g} to {max(values.values()):g}"
        console.print(styled(f"{words}, mean {format_number(mean, '.4g')} by size"))


def _cell(value: float | int | bool | None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, int) else format_number(value, ".4g")
