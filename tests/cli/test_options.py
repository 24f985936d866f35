"""Numbers on the command line: NaN and infinity are no values of any option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args, get_type_hints

import pytest

from esdtool.cli import app


def float_options() -> Iterator[tuple[str, str]]:
    """(command, option) of every option that takes a number with a fraction."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        for parameter, hint in get_type_hints(command.callback, include_extras=True).items():
            kind, *extras = get_args(hint) or (hint,)
            if float in (kind, *get_args(kind)):
                names = [given for extra in extras for given in getattr(extra, "param_decls", None) or ()]
                yield name, names[0] if names else f"--{parameter.replace('_', '-')}"


OPTIONS = list(float_options())


def test_the_options_are_found() -> None:
    assert ("analyze", "--farms-ratio") in OPTIONS
    assert ("assign", "--weight-decay") in OPTIONS


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_number_is_finite(
    command: str, option: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from esdtool.__main__ import main

    monkeypatch.setattr("sys.argv", ["esdtool", command, "somewhere", f"{option}={value}"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert option in line
