"""The table of `esdtool sweep --power`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from esdtool.comparison.power import Power
from esdtool.report.terminal.console import new_table
from esdtool.support.terminal import new_console, styled

TITLE = "Seeds for a difference, of 80 % power at 0.05 (in brackets: for the spread's upper 90 % limit)"


def print_power(found: Sequence[Power], effects: Sequence[float], *, console: Console | None = None) -> None:
    """One line for each comparison; differences are in percent of the perplexity."""
    console = console or new_console()
    table = new_table(TITLE)
    headings = ("comparison", "seeds", "difference", "spread", "detectable", *(f"{effect:g} %" for effect in effects))
    for name in headings:
        table.add_column(name, justify="left" if name == "comparison" else "right")
    for row in found:
        table.add_row(
            styled(f"{row.first} - {row.second}"),
            str(row.seeds),
            f"{row.difference:+.2f} %",
            f"{row.deviation:.2f} %",
            f"{row.detectable:.2f} %",
            *(f"{few} ({many})" for few, many in zip(row.needed, row.needed_at_most, strict=True)),
        )
    console.print(table)
