"""The Markdown pages of the documentation, and what stands in them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])

_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of code."""

    language: str
    title: str | None
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page of docs/, in order."""
    return fenced(ROOT / "docs" / page)


def fenced(path: Path) -> list[Block]:
    """The fenced blocks of a file, in order."""
    found = _FENCE.findall(path.read_text(encoding="utf-8"))
    titles = [re.search(r'title="([^"]+)"', options) for _, options, _ in found]
    return [
        Block(language=language, title=title and title[1], text=text)
        for (language, _, text), title in zip(found, titles, strict=True)
    ]


def commands(text: str) -> list[str]:
    """The lines of a block that are commands, without what `#` says about them."""
    return [line.split("  #")[0].strip() for line in text.splitlines() if line.strip()]


def run_python(words: Sequence[str], folder: Path, **environment: str) -> str:
    """What `python WORDS` prints in a folder; it must succeed, and sees no GPU."""
    result = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    assert result.returncode == 0, f"{' '.join(words)}\n{result.stderr}"
    return result.stdout


def prose(path: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", path.read_text(encoding="utf-8")))


def slug(heading: str) -> str:
    """The anchor of one heading."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    ascii_only = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and Git hosts make them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    found: set[str] = set()
    for heading in headings:
        base = slug(heading)
        number = next(n for n in range(len(headings) + 1) if (f"{base}_{n}" if n else base) not in found)
        found.add(f"{base}_{number}" if number else base)
    return found
