"""Fetch ranges of remote objects into memory: with patience, and after a cut from where it stopped.

What arrives is written where it belongs at once, so that nothing is held twice, and a server that sends more than was
asked for is left. All requests of a store for weights stand in one queue, a large tensor with several: so the tensor
that is waited for longest gets most of the link, while the next request is on its way already.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar, cast

from esdtool.checkpoint.byte_source import AccessError, ByteSource
from esdtool.checkpoint.remote.faults import CutError, RangeError, may_pass, said, wait_asked_for
from esdtool.checkpoint.remote.store import Entry, RemoteStore
from esdtool.checkpoint.remote.traffic import FETCHED

ATTEMPTS = 5
"""Attempts in a row that bring nothing before it is given up."""

FIRST_WAIT = 0.5
"""Seconds before the second attempt; each further wait is twice as long."""

_PROGRESS = 2**16
"""Bytes that make an attempt count as one that brought something."""

_AT_ONCE = 2**22
"""Bytes up to which a request does not stand in the queue: of short ones many are needed to keep a link busy."""

_PART = 2**24
"""Bytes of a tensor that one request is for. Fewer would let the Hub's limit of requests bound the speed."""

_BLOCK = 2**16
"""Bytes that are read ahead where a library reads an open file in small steps."""

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class RemoteBytes(ByteSource):
    """An object in a remote store, by what the store said of it first."""

    path: object
    """For messages."""
    store: RemoteStore = field(repr=False)
    entry: Entry
    size: int
    fingerprint: str | None = None

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the object; small reads are made of larger ones."""
        yield cast(BinaryIO, io.BufferedReader(_OpenObject(self), _BLOCK))

    def read_into(self, start: int, target: memoryview) -> None:
        """Fetch bytes into memory."""
        try:
            if len(target) <= _AT_ONCE:
                _fetch(self.store, self.entry, start, target)
            else:
                _fetch_in_parts(self.store, self.entry, start, target)
            self.store.confirm(self.entry)
        except Exception as error:
            raise AccessError(self.path, said(error, self.store)) from error


def patiently(ask: Callable[[], Answer]) -> Answer:
    """Ask a store again, with growing waits, while it is busy or the connection fails.

    Raises:
        Exception: what the last attempt raised.
    """
    patience = _Patience()
    while True:
        try:
            return ask()
        except Exception as error:
            patience.wait_after(error)


def _fetch_in_parts(store: RemoteStore, entry: Entry, start: int, target: memoryview) -> None:
    """Fill the memory by equal requests that stand in the store's queue."""
    each = math.ceil(len(target) / math.ceil(len(target) / _PART))
    left = threading.Event()
    parts = [
        store.queue.submit(_fetch, store, entry, start + first, target[first : first + each], left)
        for first in range(0, len(target), each)
    ]
    try:
        wait(parts, return_when=FIRST_EXCEPTION)
    finally:
        left.set()
        for part in parts:
            part.cancel()
    for part in parts:
        if part.done() and not part.cancelled():
            part.result()


def _fetch(
    store: RemoteStore, entry: Entry, start: int, target: memoryview, left: threading.Event | None = None
) -> None:
    """Fill the memory with an object's bytes from `start` on; not to the end if nobody waits for it any more."""
    done, patience = 0, _Patience()
    while done < len(target):
        before = done
        try:
            with store.stream(entry, start + done, start + len(target)) as pieces:
                for piece in pieces:
                    if left is not None and left.is_set():
                        return
                    FETCHED.add(len(piece))
                    if len(piece) > len(target) - done:
                        raise RangeError("the server sends more bytes than it was asked for")
                    target[done : done + len(piece)] = piece
                    done += len(piece)
            if done < len(target):
                raise CutError(f"{done} of {len(target)} bytes came")
        except Exception as error:
            if done - before >= _PROGRESS:
                patience = _Patience()
            patience.wait_after(error)


class _Patience:
    """Count the attempts that failed, and wait longer after each."""

    def __init__(self) -> None:
        self._failures = 0

    def wait_after(self, error: Exception) -> None:
        """Wait before the next attempt.

        Raises:
            Exception: the error itself, if there is no sense in another attempt.
        """
        self._failures += 1
        if self._failures >= ATTEMPTS or not may_pass(error):
            raise error
        asked = wait_asked_for(error)
        # Not time.sleep, which tests may want to replace for the server's sake.
        threading.Event().wait(FIRST_WAIT * 2 ** (self._failures - 1) if asked is None else asked)


class _OpenObject(io.RawIOBase):
    """A remote object as an open file."""

    def __init__(self, source: RemoteBytes) -> None:
        super().__init__()
        self._source, self._position = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        if base + offset < 0:
            raise ValueError("a position before the beginning")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._source.size - self._position))
        self._source.read_into(self._position, view[:count])
        self._position += count
        return count
