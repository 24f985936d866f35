"""The page for people who come from the public code names keys and scores that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from esdtool.assignment.options import LiveScoreName

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "alphadecay-code.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs" / "reference" / "config.md").read_text(encoding="utf-8")


def keys_of_the_reference() -> set[str]:
    keys, section = set(), ""
    for line in REFERENCE.splitlines():
        if heading := re.fullmatch(r"## `\[(\w+)\]`", line):
            section = heading[1]
        elif line.startswith("## "):
            section = ""
        elif section and (row := re.match(r"\| `(\w+)` \|", line)):
            keys.add(f"{section}.{row[1]}")
    return keys


def test_every_key_exists() -> None:
    known = keys_of_the_reference()
    sections = {key.partition(".")[0] for key in known}
    named = {key for key in re.findall(r"\b(\w+\.\w+)\b", PAGE) if key.partition(".")[0] in sections}
    assert len(named) > 30
    assert named <= known


def test_every_score_is_there() -> None:
    table = PAGE.partition("## Scores")[2].partition("\n## ")[0]
    assert set(get_args(LiveScoreName)) <= set(re.findall(r"`([\w-]+)`", table))
