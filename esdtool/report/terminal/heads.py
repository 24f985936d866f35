"""Print what `--per-head` found."""

from __future__ import annotations

from rich.console import Console

from esdtool.analysis.document import Analysis
from esdtool.report.tables.heads import (
    HEADS_TITLE,
    NARROW_HEADS_TITLE,
    block_columns,
    block_rows,
    nulls_words,
    unscored_words,
)
from esdtool.report.terminal.console import new_table
from esdtool.support.terminal import styled

_NARROW = 134
"""Below so many columns the table keeps to medians: six parts of three alphas need 96, names of blocks some 27."""


def print_heads(analysis: Analysis, console: Console) -> None:
    """Print alpha over the heads of each attention block; nothing where no heads were analysed."""
    if not analysis.heads:
        return
    narrow = console.width < _NARROW
    columns = block_columns(analysis, narrow=narrow)
    table = new_table(NARROW_HEADS_TITLE if narrow else HEADS_TITLE)
    if narrow:
        table.caption = "Smallest and largest: in a wider terminal; each head: --csv."
    for column in columns:
        table.add_column(column.heading, justify="left" if column.is_text else "right", overflow="fold")
    for row in block_rows(analysis):
        table.add_row(*(styled(column.cell(row)) for column in columns))
    console.print(table)
    for words in (nulls_words(analysis), unscored_words(analysis)):
        if words is not None:
            console.print(styled(words))
