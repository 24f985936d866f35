"""Define a source of bytes: one file, wherever it lies, of which any stretch can be read.

Containers read through `esdtool.checkpoint.stored_file.StoredFile`, which stands on one of these: a file on disk
(`esdtool.checkpoint.local_bytes`), or an object in a remote store (`esdtool.checkpoint.remote.object`). So each
container is written once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import BinaryIO

from esdtool.errors import CheckpointError
from esdtool.support.words import visible


class AccessError(CheckpointError):
    """A file that cannot be read, or is not the one that was opened. `one_line_errors` adds the tensor."""

    def __init__(self, path: object, why: str) -> None:
        super().__init__(f"{visible(str(path))}: cannot read: {why}")
        self.path = path
        self.why = why


class ByteSource(ABC):
    """One file, by what it was when it was opened first. Several threads may read at a time."""

    size: int
    """Bytes of the file."""
    fingerprint: str | None = None
    """Text that identifies the content without reading it (an etag, a hash); None where nothing does."""

    @abstractmethod
    def open(self) -> AbstractContextManager[BinaryIO]:
        """The file as an open one, for a library or for more than one read.

        Raises:
            AccessError: if the file is not what it was, before or afterwards.
        """

    @abstractmethod
    def read_into(self, start: int, target: memoryview) -> None:
        """Fill a writable stretch of memory with the file's bytes from `start` on.

        Raises:
            AccessError: if they cannot be read, or the file is not what it was.
        """
