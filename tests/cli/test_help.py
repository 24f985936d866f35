"""The help: complete, in groups, within 80 columns, and with nothing eaten or added."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer

from esdtool.cli import app
from esdtool.cli.help import GROUPS

Cli = Callable[..., subprocess.CompletedProcess[str]]


def commands() -> Iterator[tuple[str, Any]]:
    """Yield each command with its words, those of `cache` included."""
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        yield from ((f"{name} {word}", found) for word, found in inner.items()) if inner else [(name, command)]


COMMANDS = dict(commands())


def help_of(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    app([*name.split(), "--help"], standalone_mode=False)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_stands_once_and_within_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = help_of(name, capsys, monkeypatch)
    assert max(map(len, shown.splitlines())) <= 80
    assert not re.search(r"<[a-z]|[\u2500-\u257f]|\\\\", shown)  # no <bool>, frames or escapes
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option":
            for option in (*parameter.opts, *parameter.secondary_opts):
                defined = re.findall(rf"^  (?:-\w, )?(?:--[\w-]+, )?{option}(?=[ ,\n])", shown, re.MULTILINE)
                assert len(defined) == 1, option
        words = " ".join((parameter.help or "").split())
        assert words in " ".join(shown.split())
    # Every option that takes a value says which, in capitals or as a choice.
    values = re.findall(r"^  (?:-\w, )?--[\w-]+ (\S+)", shown, re.MULTILINE)
    assert all(re.fullmatch(r"[A-Z][A-Z.=|]*|\{[\w|-]+\}|auto\|PATH", value) for value in values), values


def test_groups_hold_what_there_is() -> None:
    grouped = [parameter for parameters in GROUPS.values() for parameter in parameters]
    found = {parameter.name for command in COMMANDS.values() for parameter in command.params}
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) <= found


def test_brackets_are_not_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "[sweep] and [[grid]]" in help_of("sweep", capsys, monkeypatch)
    assert "org/name[@revision]" in help_of("analyze", capsys, monkeypatch)


@pytest.mark.parametrize("words", [[], ["cache"]])
def test_no_command_shows_the_help_alone(words: list[str], esdtool_cli: Cli) -> None:
    bare, asked = esdtool_cli(*words), esdtool_cli(*words, "--help")
    assert bare.stderr == asked.stderr == ""
    assert bare.stdout.strip() == asked.stdout.strip()
    assert bare.stdout.startswith("Usage: esdtool")
    assert (bare.returncode, asked.returncode) in ((2, 0), (0, 0))


def test_commands_are_told_in_full(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    app(["--help"], standalone_mode=False)
    shown = " ".join(capsys.readouterr().out.split())
    for name, command in COMMANDS.items():
        if " " not in name:
            assert " ".join((command.help or "").partition("\n\n")[0].split()) in shown
