"""Every link of the README and the documentation leads somewhere, and every command that they show exists."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, prose

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"^(?:.*&& )?(?:torchrun --nproc-per-node \w+ -m )?(esdtool \w[^|&#\n]*)", re.MULTILINE)


def relative_links(path: Path) -> list[str]:
    return [target for target in _LINK.findall(prose(path)) if not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links(path: Path) -> None:
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"]
    for link in relative_links(path):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link}: no such file"
        assert target.relative_to(ROOT).parts[0] in included["include"], f"{link}: not in the sdist"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: no such heading"


def test_links_are_found() -> None:
    """The checks above look at something."""
    assert sum(len(relative_links(path)) for path in PAGES) > 100
    assert "weight-decays-wdjson" in anchors(ROOT / "docs" / "reference" / "json.md")


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The option names of each subcommand, as the reference has them."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    reference = importlib.import_module("generator.cli").page()
    sections = re.split(r"^## (.+)$", reference, flags=re.MULTILINE)
    return {
        name: {*re.findall(r"`(--?[a-z][\w-]*)`", body), "-h", "--help"}
        for name, body in zip(sections[1::2], sections[2::2], strict=True)
    }


def test_commands_exist(options: dict[str, set[str]]) -> None:
    checked = 0
    for path in PAGES:
        if path.name in ("CHANGELOG.md", "cli.md"):
            continue
        text = path.read_text(encoding="utf-8")
        fenced = re.findall(r"^```(?:sh|console|text)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        inline = re.findall(r"`(esdtool [^`]+)`", text)
        for command in [*inline, *(found for block in fenced for found in _COMMAND.findall(block))]:
            words = shlex.split(command)[1:]
            name = next((name for name in options if words[: len(name.split())] == name.split()), None)
            assert name or words[0].startswith("-") or words[0].isupper(), f"{path.name}: {command}"
            if name:
                used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
                assert used <= options[name], f"{path.name}: {command}: {used - options[name]}"
                checked += 1
    assert checked > 50
