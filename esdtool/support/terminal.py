"""Printing for people: what others named is spelled out where it could steer a terminal, and is never read as markup.

Names of tensors, files and keys come from files that anyone may have made. Everything that is said on stdout or stderr
goes through `say`, `remark` or the console of `new_console`, so that no other place has to think of it.
"""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any, Final

from esdtool.support.words import visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

PIPE_WIDTH: Final = 240
"""Columns of a console that is a file or a pipe, so that nothing is cut."""

_STAND_INS: Final = {
    **dict(zip("▁▂▃▄▅▆▇█", "_.:-=+*#", strict=True)),
    **dict(zip("░▒▓■─━│±…", ".+%#--|~.", strict=True)),
}
_HANDLER = "esdtool-stand-in"


def say(text: str = "") -> None:
    """Print text for people on stdout, and let no character of it fail or steer the terminal."""
    make_stdout_forgiving()
    print(visible_lines(text), flush=True)


def remark(text: str) -> None:
    """Print one line on stderr, opened by the program's name."""
    print(f"esdtool: {visible(text)}", file=sys.stderr, flush=True)


def visible_lines(text: str) -> str:
    r"""Spell out what `visible` does, but leave the ends of lines.

    >>> visible_lines("a\n\x1b[2Jb")
    'a\n\\x1b[2Jb'
    """
    return "\n".join(map(visible, text.split("\n")))


def styled(text: str, style: str = "") -> Text:
    """Make a piece of a table or line that has a colour; its text may be anyone's."""
    from rich.text import Text

    return Text(visible_lines(text), style=style)


def new_console(*, stderr: bool = False) -> Console:
    """Make a console that reads nothing as markup, spells out what could steer the terminal, and cuts nothing.

    On a pipe or in a file it is `PIPE_WIDTH` columns wide.
    """
    from rich.console import Console
    from rich.text import Text

    class SafeConsole(Console):
        """A console for text of anyone."""

        def render_str(self, text: str, *, style: Any = "", **options: Any) -> Text:
            """Make a string printable before it is measured; whatever `options` say, it holds no markup."""
            allowed = {name: options[name] for name in ("justify", "overflow") if name in options}
            return Text(visible_lines(text), style=style, **allowed)

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            """Make a `Text` printable that was put together elsewhere."""
            if isinstance(renderable, Text) and visible_lines(renderable.plain) != renderable.plain:
                renderable = Text.assemble(
                    *((visible_lines(part.plain), part.style) for part in _uniform_parts(renderable)),
                    style=renderable.style,
                    justify=renderable.justify,
                    overflow=renderable.overflow,
                    no_wrap=renderable.no_wrap,
                )
            return super().render(renderable, options)

    if not stderr:
        make_stdout_forgiving()
    settings: dict[str, Any] = {"stderr": stderr, "highlight": False, "markup": False, "emoji": False}
    console = SafeConsole(**settings)
    return console if console.is_terminal else SafeConsole(**settings, width=PIPE_WIDTH)


def _uniform_parts(text: Text) -> Iterable[Text]:
    """Split a text where its styles change."""
    ends = {0, len(text.plain)} | {place for span in text.spans for place in (span.start, span.end)}
    for part in text.divide(sorted(ends)):
        if part.plain:
            style = part.spans[-1].style if part.spans else ""
            yield type(text)(part.plain, style=style)


def make_stdout_forgiving() -> None:
    """Let stdout print every text, whatever its encoding: blocks as ASCII, what else it lacks as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        codecs.register_error(_HANDLER, _stand_in)
        sys.stdout.reconfigure(errors=_HANDLER)


def write_data(text: str, stream: IO[str] | None = None) -> None:
    """Put a document on stdout, to the letter; on a terminal what could steer it is spelled out, as `ls` does."""
    stream = stream or sys.stdout
    make_stdout_forgiving()
    stream.write(visible_lines(text) if stream.isatty() else text)
    stream.flush()


def can_encode(text: str, encoding: str) -> bool:
    """Tell whether every character has a code in an encoding.

    >>> can_encode("▁█", "utf-8"), can_encode("▁█", "latin-1"), can_encode("▁█", "no such")
    (True, False, False)
    """
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    escaped = character.encode("ascii", "backslashreplace").decode("ascii")
    return _STAND_INS.get(character, escaped), error.start + 1
