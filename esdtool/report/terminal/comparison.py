"""A comparison of checkpoints in the terminal: modules side by side, roles, what moved most, and the conclusion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esdtool.comparison.checkpoints import CheckpointComparison, ComparedModule, is_significant
from esdtool.report.tables.analysis import Column, skipped_rows
from esdtool.report.tables.comparison import (
    LEGEND,
    STAR,
    checkpoint_columns,
    compared_columns,
    comparison_rows,
    comparison_words,
    moved_columns,
    moved_most,
    role_columns,
)
from esdtool.report.tables.experts import Experts
from esdtool.report.terminal.console import left_out_words, new_table
from esdtool.support.terminal import new_console, styled

_NARROW = 128
"""Below so many columns the table keeps to the essentials."""

_HEAVIER, _LIGHTER = "bold cyan", "bold yellow"
"""Differences that are more than chance, by their direction."""

_Row = TypeVar("_Row")


def print_comparison(
    comparison: CheckpointComparison,
    *,
    sort: str = "order",
    top: int | None = None,
    experts: Experts = "mean",
    console: Console | None = None,
) -> None:
    """Everything a person wants to see of a comparison, on stdout unless a console is given."""
    console = console or new_console()
    positions = range(len(comparison.checkpoints))
    console.print(_table("checkpoints", checkpoint_columns(comparison), positions))
    if comparison.modules:
        found = comparison_rows(comparison, sort=sort, top=top, experts=experts)
        columns = compared_columns(comparison, narrow=console.width < _NARROW)
        table = _table(found.title, columns, found.rows)
        table.caption = left_out_words(compared_columns(comparison, narrow=False), columns, console, elsewhere="--csv")
        console.print(table)
        if any(is_significant(side) for module in found.rows for side in module.sides):
            console.print(f"{LEGEND}\n")
    if comparison.summary.by_role:
        console.print(_table("mean alpha by role", role_columns(comparison), comparison.summary.by_role))
    if comparison.summary.moved_most:
        console.print(_moved(comparison))
    if comparison.unmatched:
        console.print(_unmatched(comparison))
    console.print(styled(comparison_words(comparison)))


def _table(title: str, columns: Sequence[Column[_Row]], rows: Iterable[_Row]) -> Table:
    table = new_table(title)
    for column in columns:
        table.add_column(
            styled(column.heading),
            justify="left" if column.is_text else "right",
            no_wrap=column.heading not in ("module", "checkpoint", "verdict", "modules"),
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(_cell(column, row) for column in columns))
    return table


def _cell(column: Column[_Row], row: _Row) -> Text:
    shown = column.cell(row)
    if not column.heading.endswith("- A") or not isinstance(row, ComparedModule):
        return styled(shown)
    if not shown.endswith(STAR):
        return styled(f"{shown} ")  # so that the figures of all rows stand below each other
    return styled(shown, style=_HEAVIER if shown.startswith("-") else _LIGHTER)


def _moved(comparison: CheckpointComparison) -> Table:
    table = new_table("moved most")
    for column in moved_columns(comparison):
        table.add_column(column.heading, justify="left" if column.is_text else "right", overflow="fold")
    for row in moved_most(comparison):
        table.add_row(*(styled(column.cell(row)) for column in moved_columns(comparison)))
    return table


def _unmatched(comparison: CheckpointComparison) -> Table:
    rows = skipped_rows(comparison.unmatched)
    table = new_table(f"without a counterpart: {len(comparison.unmatched)} modules")
    table.add_column("modules", justify="right")
    table.add_column("name", overflow="fold")
    table.add_column("reason", overflow="fold")
    for count, name, reason in rows:
        table.add_row(str(count), styled(name), styled(reason))
    return table
