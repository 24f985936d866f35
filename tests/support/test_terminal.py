"""Text of anyone reaches a terminal as characters that can be seen, and as nothing else."""

from __future__ import annotations

import io
import re
import sys
import unicodedata

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esdtool.report.terminal.console import new_table
from esdtool.support.terminal import new_console, remark, say, styled, write_data
from esdtool.support.words import counted, first_of, listed, others, visible

# Written down apart from the code's own table: control characters, direction, zero width, surrogates, private use.
HARMFUL = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ue000-\uf8ff\U000e0000-\U000e007f]"
)
HOSTILE = (
    "\x1b]52;c;aGk=\x07",
    "\x1b[2J\x1b[1;1H",
    "\x9b2J",
    "back\x08\x08\x08\x08space",
    "line\rfeed",
    "two\nlines",
    "\u202etxt.exe",
    "zero\u200bwidth",
    "\ud800lone",
    "tag\U000e0041",
    "[red]markup[/red] [link=http://x]y[/link] :smiley: [/]",
)


def test_every_character_that_hides_is_spelled_out() -> None:
    shown = visible("".join(map(chr, range(sys.maxunicode + 1))))
    assert not HARMFUL.search(shown)
    assert "\n" not in shown
    assert all(unicodedata.category(character)[0] in "LMNPSZ" for character in set(shown))


def test_what_can_be_seen_is_left_as_it_is() -> None:
    for text in ("model.layers.0", "模型.权重", "größe", "e\u0301", "a b", "α ≤ 2 ± 0.1", "🤗"):
        assert visible(text) == text


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("console_of", ["ours", "rich's own"])
def test_tables_show_it_whoever_made_the_console(
    text: str, console_of: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = new_table(text)
    table.add_column(styled(text))
    table.add_row(styled(text, "bold"))
    # An encoding that has no surrogates would fail by itself.
    console = new_console() if console_of == "ours" else Console(width=200)
    console.print(table)
    console.print(styled(f"{text} in a sentence"))
    printed = capsys.readouterr().out
    assert not HARMFUL.search(printed)
    assert sum(visible(part) in printed for part in text.split("\n")) == len(text.split("\n"))


@pytest.mark.parametrize("text", HOSTILE)
def test_our_console_trusts_no_string_and_no_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    console = new_console()
    table = Table(title=text, caption=text)
    table.add_column(text, footer=text)
    table.add_row(text)
    table.add_row(Text(text))
    table.add_row(Text.assemble("a ", (text, "red"), " b"))
    for part in (table, text, Text(text), Text.assemble((text, "bold"), " and more")):
        console.print(part)
    printed = capsys.readouterr().out
    assert not HARMFUL.search(printed)
    # A rich Text drops some control characters by itself; strings are wholly ours.
    assert printed.count(visible(text.split("\n")[0])) >= 5


def test_styles_of_a_text_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console = new_console()
    console._force_terminal, console._color_system = True, None
    with console.capture() as capture:
        console.print(Text.assemble("a\x1b", ("b\x9b", "bold"), "c"))
    assert re.sub(r"\x1b\[[0-9;]*m", "", capture.get()) == "a\\x1bb\\x9bc\n"


@pytest.mark.parametrize("text", HOSTILE)
def test_lines_on_both_streams(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(f"a {text}")
    remark(f"b {text}")
    out, err = capsys.readouterr()
    assert not HARMFUL.search(out + err)
    assert err == f"esdtool: b {visible(text)}\n"


def test_documents_are_written_to_the_letter_except_to_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    text = "name,\x1b[2J\nsecond\n"
    plain, terminal = io.StringIO(), Terminal()
    write_data(text, plain)
    write_data(text, terminal)
    assert plain.getvalue() == text
    assert terminal.getvalue() == "name,\\x1b[2J\nsecond\n"


def test_lists_of_names() -> None:
    names = [f"n{index}" for index in range(10)]
    for most in range(1, 12):
        told = listed(names, most)
        assert all((name in re.split(r", | and ", told)) == (place < most) for place, name in enumerate(names))
        assert told.endswith(f" and {10 - most} more") == (most < 10)
    assert first_of(names) == "n0 (and 9 more)" == names[0] + others(names)
    assert (counted(1, "entry", "entries"), counted(12345, "tensor")) == ("1 entry", "12,345 tensors")
