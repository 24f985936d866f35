"""Access to one file: a regular one only, within its bounds, and the same file at every read.

Nothing is mapped into memory: a file that becomes shorter would end the process with SIGBUS.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from esdtool.checkpoint.limits import check_length
from esdtool.errors import CheckpointError
from esdtool.support.words import visible

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_LFS_POINTER = b"version https://git-lfs."
_HEAD = 64


class AccessError(CheckpointError):
    """A file that cannot be read, or is not the one that was opened. `one_line_errors` adds the tensor."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{visible(str(path))}: cannot read: {why}")
        self.path = path
        self.why = why


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The properties that show whether a file is still the same."""

    device: int
    inode: int
    size: int
    modified: int
    """Nanoseconds."""

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Return the identity that a file's status shows."""
        return cls(device=status.st_dev, inode=status.st_ino, size=status.st_size, modified=status.st_mtime_ns)


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A regular file, or a stretch of one, by what it was when it was opened first. No handle stays open."""

    path: Path
    identity: Identity = field(repr=False)
    start: int = 0
    """First byte of the stretch."""
    size: int
    """Bytes of the stretch."""

    @classmethod
    def at(cls, path: Path) -> StoredFile:
        """Look at a file.

        Raises:
            CheckpointError: if it is no regular file (a FIFO or a device would be waited for), or cannot be read.
        """
        with _opened(path) as file:
            identity = Identity.of(os.fstat(file.fileno()))
        return cls(path=path, identity=identity, size=identity.size)

    def part(self, start: int, size: int) -> StoredFile:
        """Return a stretch of this one.

        Raises:
            CheckpointError: if it lies outside.
        """
        if start < 0 or size < 0 or start + size > self.size:
            raise AccessError(self.path, f"{size} bytes from byte {start} on lie outside of the file")
        return StoredFile(path=self.path, identity=self.identity, start=self.start + start, size=size)

    @cached_property
    def head(self) -> bytes:
        """The first 64 bytes.

        Raises:
            CheckpointError: if the file is empty, or is a Git LFS pointer.
        """
        with self.open() as file:
            head = file.read(_HEAD)
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
        with _opened(self.path) as file:
            self._check(os.fstat(file.fileno()))
            try:
                yield file if self._is_whole else cast(BinaryIO, _Window(file, self.start, self.size))
            except Exception:
                self._check_both(file)  # a file that has changed explains any error
                raise
            self._check_both(file)

    def read(self, start: int, count: int) -> npt.NDArray[np.uint8]:
        """Read some bytes into memory of their own.

        Raises:
            CheckpointError: if they lie outside, or the file is not what it was.
        """
        import numpy as np

        if start < 0 or count < 0 or start + count > self.size:
            raise AccessError(self.path, f"{count} bytes from byte {start} on lie outside of the file")
        data = np.empty(count, dtype=np.uint8)
        with self.open() as file:
            file.seek(start)
            view, done = memoryview(cast(Any, data)), 0
            while done < count:
                got = cast(Any, file).readinto(view[done:])
                if not got:
                    raise self._changed("has become shorter")
                done += got
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
        return self.start == 0 and self.size == self.identity.size

    def _check_both(self, file: IO[bytes]) -> None:
        """Compare the open file and what stands under its name now."""
        self._check(os.fstat(file.fileno()))
        try:
            now = self.path.stat()
        except OSError:
            raise self._changed("was removed") from None
        self._check(now)

    def _check(self, status: os.stat_result) -> None:
        now = Identity.of(status)
        if now == self.identity:
            return
        if (now.device, now.inode) != (self.identity.device, self.identity.inode):
            raise self._changed("was replaced by another")
        if now.size < self.identity.size:
            raise self._changed("has become shorter")
        raise self._changed("was written to")

    def _changed(self, how: str) -> AccessError:
        return AccessError(
            self.path, f"the file {how} since it was opened; run again once nothing changes the checkpoint"
        )


def exists(path: Path) -> bool:
    """Return whether there is a file of that name, however impossible the name."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, opened without waiting."""
    try:
        # Opening a device may already do something; the second look is at what was opened.
        regular = stat.S_ISREG(path.stat().st_mode)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags) if regular else -1
    except OSError as error:
        raise AccessError(path, error.strerror or type(error).__name__) from error
    except ValueError as error:  # a name with a zero byte, or one that cannot be encoded
        raise AccessError(path, "not a valid file name") from error
    if not regular:
        raise AccessError(path, "not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise AccessError(path, "not a regular file")
        yield file


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
