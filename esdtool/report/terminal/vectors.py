"""Print what `--vectors` found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from esdtool.analysis.document import Analysis
from esdtool.report.tables.analysis import Column
from esdtool.report.tables.vectors import (
    LOCALISED_COLUMNS,
    ROLES_TITLE,
    VECTOR_ROLE_COLUMNS,
    localised_rows,
    localised_title,
    role_rows,
    without_vectors,
)
from esdtool.report.terminal.console import new_table
from esdtool.support.terminal import styled

_Row = TypeVar("_Row")


def print_vectors(analysis: Analysis, console: Console) -> None:
    """Print the ratios by role and the most localised vectors; nothing unless they were asked for."""
    if not analysis.settings.vectors:
        return
    roles, rows = role_rows(analysis), localised_rows(analysis)
    if roles:
        console.print(_table(ROLES_TITLE, VECTOR_ROLE_COLUMNS, roles))
        if rows:
            console.print(_table(localised_title(analysis, rows), LOCALISED_COLUMNS, rows))
        else:
            console.print(f"{localised_title(analysis, rows).capitalize()}.")
    missing = without_vectors(analysis)
    if missing is not None:
        console.print(styled(missing))


def _table(title: str, columns: Sequence[Column[_Row]], rows: Iterable[_Row]) -> Table:
    table = new_table(title)
    for column in columns:
        table.add_column(column.heading, justify="left" if column.is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(styled(column.cell(row)) for column in columns))
    return table
