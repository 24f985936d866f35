"""The source code of Python's standard library as a corpus: some 11 MB of text on every machine."""

from __future__ import annotations

import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from esdtool.errors import ConfigError
from esdtool.train.data.corpus import Corpus, fingerprint_of, not_blank

# Tests and IDLE are a different kind of text; the others are not the standard library's own.
_EXCLUDED: Final = frozenset({"test", "tests", "idlelib", "ensurepip", "site-packages", "dist-packages", "__pycache__"})


def stdlib_corpus(root: Path | None = None) -> Corpus:
    """Return one document per .py file, in the order of their paths.

    Args:
        root: the folder to read instead of the running Python's.

    Raises:
        ConfigError: if this Python keeps its library in no folder, or a file is not valid source text.
    """
    folder = root or Path(sysconfig.get_paths()["stdlib"])
    files = stdlib_files(folder)
    if not files:
        raise ConfigError(
            f'data.source = "stdlib": this Python has no library source in {folder}; use data.source = "files"'
        )

    def documents() -> Iterator[str]:
        return not_blank(_read(file) for file in files)

    fingerprint = fingerprint_of("files", *(file.read_bytes() for file in files))
    return Corpus(name="stdlib", fingerprint=fingerprint, documents=documents)


def stdlib_files(folder: Path) -> list[Path]:
    """Return the .py files of the library, without its tests and without what the build of one machine generated."""
    found = []
    for file in folder.rglob("*.py"):
        relative = file.relative_to(folder)
        if not _EXCLUDED.intersection(relative.parts[:-1]) and not relative.name.startswith("_sysconfig"):
            found.append((relative.parts, file))
    return [file for _, file in sorted(found)]


def _read(file: Path) -> str:
    try:
        # Source files may declare an encoding of their own.
        with tokenize.open(file) as source:
            return source.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot read as Python source: {error}") from error
