"""Tables in the house style."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from esdtool.support.terminal import styled


def new_table(title: str) -> Table:
    """Make a table with no rules but the one below the headings, so that it pastes well and stays narrow.

    Its cells and headings are plain strings, or pieces that `styled` made: either may be text of anyone.
    """
    # As a piece of its own the title is not wrapped at the table's width.
    heading = styled(title, "bold")
    heading.no_wrap, heading.overflow = True, "ignore"
    return Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def has_colours(console: Console) -> bool:
    """Tell whether shades of colour differ on the console: a terminal of 256 or more of them, and no NO_COLOR."""
    return console.is_terminal and not console.no_color and console.color_system in ("256", "truecolor")
