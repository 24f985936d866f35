"""Writing files so that a failure never leaves half of one, and the per-user cache directory."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from esdtool.errors import OutputError


@contextmanager
def atomic_write(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder and rename it onto the target at the end.

    If the body raises, the temporary file is removed and the target stays as it was.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "out.txt"
    >>> with atomic_write(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'

    Raises:
        OutputError: if the folder does not exist or the file cannot be written.
    """
    target = Path(target)
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(descriptor)
    except OSError as error:
        raise OutputError(f"{target}: cannot write: {error.strerror}") from error
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; the result should have the mode that `open` would have given.
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        temporary.chmod(mode)
        temporary.replace(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot write: {error.strerror or error}") from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def atomic_write_text(target: str | Path, text: str) -> None:
    """Replace a text file (UTF-8) by `text`, wholly or not at all."""
    with atomic_write(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_dir() -> Path:
    """The directory for what may be deleted at any time: `ESDTOOL_CACHE_DIR`, or the platform's usual place."""
    override = os.environ.get("ESDTOOL_CACHE_DIR")
    if override:
        return Path(override)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "esdtool"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "esdtool" / "Cache"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "esdtool"


def _umask() -> int:
    """The process's umask. POSIX can only read it by setting it."""
    current = os.umask(0o022)
    os.umask(current)
    return current
