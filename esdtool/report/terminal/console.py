"""Tables in the house style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esdtool.report.tables.analysis import Column
from esdtool.support.terminal import styled

_Row = TypeVar("_Row")


def new_table(title: str) -> Table:
    """Make a table with no rules but the one below the headings, so that it pastes well and stays narrow.

    Its cells and headings are plain strings, or pieces that `styled` made: either may be text of anyone.
    """
    # As a piece of its own the title is not wrapped at the table's width.
    heading = styled(title, "bold")
    heading.no_wrap, heading.overflow = True, "ignore"
    return Table(title=heading, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def left_out_words(
    all_columns: Sequence[Column[_Row]], shown: Sequence[Column[_Row]], console: Console, *, elsewhere: str
) -> Text | None:
    """Say which columns a table of this width leaves out, and where they are; None if it has them all.

    Args:
        all_columns: the columns of a table of any width.
        shown: those that the table has.
        console: where it is printed.
        elsewhere: what has all columns.
    """
    headings = [column.heading for column in shown]
    missing = [name for name in dict.fromkeys(column.heading for column in all_columns) if name not in headings]
    if not missing:
        return None
    words = f"Left out at {console.width} columns: {', '.join(missing)}. A wider terminal and {elsewhere} have them."
    return styled(words, "dim")


def has_colours(console: Console) -> bool:
    """Tell whether shades of colour differ on the console: a terminal of 256 or more of them, and no NO_COLOR."""
    return console.is_terminal and not console.no_color and console.color_system in ("256", "truecolor")
