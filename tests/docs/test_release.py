"""What a release needs: one version everywhere, a valid citation, a clean import, a whole sdist."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from datetime import date
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from esdtool._version import __version__
from tests.docs.pages import ROOT

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_version() -> None:
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "esdtool/_version.py"
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] in (__version__, "Unreleased")
    assert citation()["version"] == __version__


def citation() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    return loaded


def test_citation() -> None:
    """The fields that CFF 1.2.0 requires, and kinds of values that it allows."""
    document = citation()
    assert document["cff-version"] == "1.2.0"
    assert document["type"] == "software"
    assert document["license"] == PYPROJECT["project"]["license"]
    assert [author["name"] for author in document["authors"]] == [a["name"] for a in PYPROJECT["project"]["authors"]]
    assert {type(document[key]) for key in ("message", "title", "version", "abstract")} == {str}
    assert not isinstance(document.get("date-released"), str) or date.fromisoformat(document["date-released"])
    for reference in document["references"]:
        assert {"type", "title", "authors"} <= set(reference)
        assert all(set(author) == {"family-names", "given-names"} for author in reference["authors"])
    assert any(
        {"type": "other", "value": "arXiv:2506.14562"} in reference.get("identifiers", [])
        for reference in document["references"]
    )


BY_HAND = ("torch",)
"""Tested with a lower version than CI's, since all of those are builds for CUDA: see CONTRIBUTING.md."""


def test_the_lowest_versions_are_those_that_ci_tests() -> None:
    lowest = (ROOT / ".ci" / "lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lowest if not line.startswith("#"))
    claimed = dict(re.split(r">=", requirement) for requirement in PYPROJECT["project"]["dependencies"])
    assert tested.keys() == claimed.keys()
    for name, version in claimed.items():
        if name in BY_HAND:
            assert f"{name}=={version}" in (ROOT / "CONTRIBUTING.md").read_text()
            continue
        assert [*tested[name].split("."), "0"][: version.count(".") + 1] == version.split("."), name


def test_what_the_extras_bring_is_pinned_for_ci() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line[0] != "#")
    }
    needs = [
        Requirement(text)
        for extra, texts in PYPROJECT["project"]["optional-dependencies"].items()
        for text in texts
        if extra not in ("wandb", "timm")  # not installed by CI
    ]
    for need in needs:
        if need.name != "esdtool":
            assert need.specifier.contains(pins[canonicalize_name(need.name)]), need


@pytest.mark.parametrize("words", [["-c", "import esdtool"], ["-m", "esdtool", "--version"]])
def test_clean_under_w_error(words: list[str]) -> None:
    result = subprocess.run([sys.executable, "-W", "error", *words], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout in ("", f"esdtool {__version__}\n")


def test_every_public_name_is_clean_under_w_error() -> None:
    """They are imported on first use: this is what `import esdtool` alone does not show."""
    script = "import esdtool\nfor name in esdtool.__all__: getattr(esdtool, name)"
    result = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_sdist_is_whole() -> None:
    """All that a clone has at its top, apart from what is built or kept there."""
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all((ROOT / name).exists() for name in included)
    ignored = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    present = {path.name for path in ROOT.iterdir() if not any(path.match(pattern) for pattern in ignored)}
    # Files of a checkout, and of an unpacked sdist.
    apart = {".git", ".gitignore", ".gitattributes", "PKG-INFO"}
    assert present - apart <= set(included)
