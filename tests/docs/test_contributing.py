"""CONTRIBUTING tells a newcomer one file for each kind of addition, and the page on extending shows and tries it."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT, blocks, slug

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (an? [^|]+) \| `([\w/]+)/NAME\.py` \| \[[^]]+\]\(([^)]+)\) \|$", TEXT, flags=re.MULTILINE)


def test_the_questions_of_a_newcomer_are_answered() -> None:
    questions = " ".join(question for question, _, _ in ROWS)
    assert all(word in questions for word in ("estimator", "family", "container", "policy", "figure"))


@pytest.mark.parametrize(("folder", "link"), [row[1:] for row in ROWS])
def test_the_answer_is_one_file_that_is_shown(folder: str, link: str) -> None:
    target, _, anchor = link.partition("#")
    if not anchor:
        assert target.startswith(f"{folder}/")
        assert (ROOT / target).is_file()
        return
    # Its section has that one file, and changes no other: tests/docs/test_extending.py runs it on a copy.
    page = (ROOT / target).read_text(encoding="utf-8")
    sections = page.split("\n## ")[1:]
    (section,) = (part for part in sections if slug(part.splitlines()[0]) == anchor)
    titles = re.findall(r'^```\w+ title="([^"]+)"', section, flags=re.MULTILINE)
    assert len(titles) == 1
    assert re.fullmatch(rf"{folder}/\w+\.py", titles[0])
    assert titles[0] in {block.title for block in blocks("extending.md")}


def test_every_package_is_on_the_map() -> None:
    listed = set(re.findall(r"^esdtool/(\w+)/", TEXT, flags=re.MULTILINE))
    assert listed == {path.parent.name for path in (ROOT / "esdtool").glob("*/__init__.py")}
