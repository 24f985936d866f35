"""Access to one file within its bounds, on disk or in a remote store, and the same file at every read."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from esdtool.checkpoint.byte_source import AccessError, ByteSource
from esdtool.checkpoint.limits import check_length
from esdtool.checkpoint.local_bytes import LocalBytes
from esdtool.checkpoint.remote.path import RemotePath
from esdtool.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["AccessError", "Place", "StoredFile", "exists", "is_there"]

Place = Path | RemotePath
"""Where a file or a folder lies: on disk, or in a remote store."""

_LFS_POINTER = b"version https://git-lfs."
_HEAD = 64


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file, or a stretch of one, by what it was when it was opened first. No handle stays open."""

    path: Place
    source: ByteSource = field(repr=False)
    start: int = 0
    """First byte of the stretch."""
    size: int
    """Bytes of the stretch."""

    @classmethod
    def at(cls, path: Place) -> StoredFile:
        """Look at a file.

        Raises:
            CheckpointError: if it is no regular file (a FIFO or a device would be waited for), or cannot be read.
        """
        source = LocalBytes.at(path) if isinstance(path, Path) else path.bytes()
        return cls(path=path, source=source, size=source.size)

    def part(self, start: int, size: int) -> StoredFile:
        """Return a stretch of this one.

        Raises:
            CheckpointError: if it lies outside.
        """
        if start < 0 or size < 0 or start + size > self.size:
            raise AccessError(self.path, f"{size} bytes from byte {start} on lie outside of the file")
        return StoredFile(path=self.path, source=self.source, start=self.start + start, size=size)

    @cached_property
    def head(self) -> bytes:
        """The first 64 bytes.

        Raises:
            CheckpointError: if the file is empty, or is a Git LFS pointer.
        """
        head = self.read(0, min(_HEAD, self.size)).tobytes()
        if not head:
            raise CheckpointError(f"{self.path}: empty file; download or copy it again")
        if head.startswith(_LFS_POINTER):
            raise CheckpointError(
                f"{self.path}: a Git LFS pointer, not the weights; run 'git lfs pull' in its repository"
            )
        return head

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The stretch as a file of its own, for a library or for more than one read.

        Raises:
            CheckpointError: if the file is not what it was, before or afterwards.
        """
        with self.source.open() as file:
            yield file if self._is_whole else cast(BinaryIO, _Window(file, self.start, self.size))

    def read(self, start: int, count: int) -> npt.NDArray[np.uint8]:
        """Read some bytes into memory of their own.

        Raises:
            CheckpointError: if they lie outside, or the file is not what it was.
        """
        import numpy as np

        if start < 0 or count < 0 or start + count > self.size:
            raise AccessError(self.path, f"{count} bytes from byte {start} on lie outside of the file")
        data = np.empty(count, dtype=np.uint8)
        self.source.read_into(self.start + start, memoryview(cast(Any, data)))
        return data

    def read_all(self, most: int) -> bytes:
        """Return the whole stretch.

        Raises:
            CheckpointError: if it has more than `most` bytes, or the file is not what it was.
        """
        check_length(str(self.path), self.size, most)
        return self.read(0, self.size).tobytes()

    @property
    def _is_whole(self) -> bool:
        return self.start == 0 and self.size == self.source.size


def exists(path: Place) -> bool:
    """Return whether there is a file of that name, however impossible the name.

    Raises:
        CheckpointError: if a remote store does not say.
    """
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_there(path: Place) -> bool:
    """Return whether something stands under that name, a link that leads nowhere included.

    Raises:
        CheckpointError: if a remote store does not say.
    """
    return os.path.lexists(path) if isinstance(path, Path) else path.exists()


class _Window(io.RawIOBase):
    """A stretch of a file as a file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("a position before the beginning")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._position))
        self._file.seek(self._start + self._position)
        data = self._file.read(count)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)
