"""Name the files of figures: each by what it shows, and no two alike."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

from esdtool.analysis.document import Analysis
from esdtool.report.figures.style import subject

_LONGEST = 150
"""Bytes of a name's part in a file's name; file systems take 255 for the whole."""


def file_part(name: str) -> str:
    """Turn a name into a part of a file's name; what is cut off is told by a checksum of the whole.

    >>> file_part("model.layers.0/q proj")
    'model.layers.0-q-proj'
    >>> file_part("x" * 200)[-12:], file_part("x" * 201)[-12:]
    ('xxx-aa20c23e', 'xxx-84a0678c')
    """
    part = re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "unnamed"
    return part if len(part.encode()) <= _LONGEST else _shortened(part, name)


def distinct_parts(names: Sequence[str]) -> list[str]:
    """Turn names into parts of files' names that differ, also where a file system takes A and a for one letter.

    >>> distinct_parts(["a/b", "a b", "c"])
    ['a-b-c14cddc0', 'a-b-c8687a08', 'c']
    """
    parts = [file_part(name) for name in names]
    count = Counter(part.casefold() for part in parts)
    parts = [
        part if count[part.casefold()] == 1 else _shortened(part, name) for part, name in zip(parts, names, strict=True)
    ]
    # Only the same name twice is left.
    count = Counter(parts)
    return [part if count[part] == 1 else f"{part}-{place}" for place, part in enumerate(parts, start=1)]


def distinct_endings(labels: Sequence[str]) -> list[str]:
    """Make an ending of a file's name for each of several things; a single thing needs none."""
    return [""] if len(labels) == 1 else [f"-{part}" for part in distinct_parts(labels)]


def analysis_endings(analyses: Sequence[Analysis]) -> list[tuple[str, Analysis]]:
    """Pair each analysis with the ending of its files' names."""
    return list(zip(distinct_endings([subject(analysis) for analysis in analyses]), analyses, strict=True))


def _shortened(part: str, name: str) -> str:
    checksum = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    kept = part.encode()[: _LONGEST - len(checksum) - 1].decode(errors="ignore")
    return f"{kept}-{checksum}"
