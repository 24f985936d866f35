"""Folders of the cache that several processes build together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from esdtool.errors import OutputError
from esdtool.support.files import cache_directory


def cache_folder(name: str) -> Path:
    """Return a folder of the cache directory, made if need be.

    Raises:
        OutputError: if it cannot be made.
    """
    folder = cache_directory() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot make the cache folder (ESDTOOL_CACHE_DIR): {error.strerror}") from error
    return folder


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold a lock beside `target`: of all ranks that want a file, one makes it and the others wait for it."""
    try:
        lock = FileLock(target.with_name(target.name + ".lock"))
        lock.acquire()
    except OSError as error:
        raise OutputError(f"{target.parent}: cannot write: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()
