"""A file on disk as a source of bytes: a regular one only, and the same file at every read.

Nothing is mapped into memory: a file that becomes shorter would end the process with SIGBUS.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from esdtool.checkpoint.byte_source import AccessError, ByteSource


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
class LocalBytes(ByteSource):
    """A regular file, by what it was when it was opened first. No handle stays open."""

    path: Path
    identity: Identity = field(repr=False)
    size: int
    fingerprint: str | None = None

    @classmethod
    def at(cls, path: Path, *, fingerprint: str | None = None) -> LocalBytes:
        """Look at a file.

        Raises:
            AccessError: if it is no regular file (a FIFO or a device would be waited for), or cannot be read.
        """
        with _opened(path) as file:
            identity = Identity.of(os.fstat(file.fileno()))
        return cls(path=path, identity=identity, size=identity.size, fingerprint=fingerprint)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file, and check before and afterwards that it is what it was."""
        with _opened(self.path) as file:
            self._check(os.fstat(file.fileno()))
            try:
                yield file
            except Exception:
                self._check_both(file)  # a file that has changed explains any error
                raise
            self._check_both(file)

    def read_into(self, start: int, target: memoryview) -> None:
        """Read bytes from the disk into memory."""
        with self.open() as file:
            file.seek(start)
            done = 0
            while done < len(target):
                got = cast(Any, file).readinto(target[done:])
                if not got:
                    raise self._changed("has become shorter")
                done += got

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
