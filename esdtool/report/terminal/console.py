"""Where tables are printed: a console that cuts nothing in a pipe and fails on no character."""

from __future__ import annotations

import codecs
import io
import sys
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 240
"""Columns when stdout is a file or a pipe: nothing is cut."""

_STAND_INS: Final = {
    **dict(zip("▁▂▃▄▅▆▇█", "_.:-=+*#", strict=True)),
    **dict(zip("░▒▓■─━│±…", ".+%#--|~.", strict=True)),
}
_HANDLER = "esdtool-stand-in"


def new_table(title: str) -> Table:
    """A table in the house style: no rules but the one below the headings, so that it pastes well and stays narrow."""
    # As a Text it is neither wrapped at the table's width nor read as markup.
    heading = Text(title, style="bold", no_wrap=True, overflow="ignore")
    return Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def stdout_console() -> Console:
    """A console on stdout that never truncates what goes into a file or a pipe."""
    make_stdout_forgiving()
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def make_stdout_forgiving() -> None:
    """Let stdout print every text, whatever its encoding: blocks as ASCII, what else it lacks as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        codecs.register_error(_HANDLER, _stand_in)
        sys.stdout.reconfigure(errors=_HANDLER)


def can_encode(text: str, encoding: str) -> bool:
    """Whether every character has a code.

    >>> can_encode("▁█", "utf-8"), can_encode("▁█", "latin-1"), can_encode("▁█", "no such")
    (True, False, False)
    """
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def has_colours(console: Console) -> bool:
    """Whether shades of colour can be told apart on the console: a terminal of 256 or more, and no NO_COLOR."""
    return console.is_terminal and not console.no_color and console.color_system in ("256", "truecolor")


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    escaped = character.encode("ascii", "backslashreplace").decode("ascii")
    return _STAND_INS.get(character, escaped), error.start + 1
