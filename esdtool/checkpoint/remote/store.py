"""Define the interface of a remote store: what lies in a folder, and any range of an object's bytes."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

_REQUESTS = 2
"""Requests for weights at a time: one arrives while the other is on its way. With more the first would come later."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing in a store, by what the store says of it."""

    key: str
    """Name in the store, with `/` between folders."""
    is_folder: bool = False
    size: int = 0
    """Bytes of an object."""
    identity: str | None = None
    """What changes with the content: an etag, a hash or a generation; None where the store tells nothing like it."""


class RemoteStore(ABC):
    """A place of objects. Several threads may ask at a time.

    Methods raise what their library raises: `esdtool.checkpoint.remote.faults` knows what it means.
    """

    credentials: str = "check your credentials for it"
    """What to do about a refusal, for messages."""
    copy: str = "copy it to this machine and name the copy"
    """How to do without ranges, for messages."""
    has_listings: bool = True

    def __init__(self) -> None:
        self._opened: dict[str, Entry] = {}
        self._lock = threading.Lock()
        self.queue = ThreadPoolExecutor(_REQUESTS, "esdtool-fetch")
        """Requests for weights, made in the order in which they come."""

    @abstractmethod
    def shown(self, key: str) -> str:
        """Name of an object for people, without passwords and signatures."""

    @abstractmethod
    def entry(self, key: str) -> Entry | None:
        """Look something up; None if there is nothing of that name."""

    @abstractmethod
    def entries(self, folder: str) -> Mapping[str, Entry]:
        """List a folder: what is in it, by its name there. Not asked of stores without listings."""

    @abstractmethod
    def stream(self, entry: Entry, start: int, stop: int) -> AbstractContextManager[Iterator[bytes]]:
        """Ask for the bytes from `start` to before `stop`, in pieces as they arrive.

        Raises:
            RangeError: if other bytes are sent than were asked for.
            ChangedError: if the object is not what it was.
        """

    def local(self, key: str) -> Path | None:  # noqa: ARG002 - for stores with a cache
        """Return the copy of an object that a library keeps on this machine, if there is one."""
        return None

    def confirm(self, entry: Entry) -> None:  # noqa: B027 - for stores whose answers do not say of which version they are
        """Check after a read that an object is still what it was.

        Raises:
            ChangedError: if it is not.
        """

    def note_opened(self, entry: Entry) -> None:
        """Remember that an object belongs to what is being opened."""
        with self._lock:
            self._opened[entry.key] = entry

    @property
    def opened_bytes(self) -> int:
        """Bytes of all objects that were opened."""
        with self._lock:
            return sum(entry.size for entry in self._opened.values())

    @property
    def fingerprint(self) -> str | None:
        """Text that identifies all that was opened; None if some of it has no identity."""
        with self._lock:
            opened = sorted(self._opened.items())
        if not opened or any(entry.identity is None for _, entry in opened):
            return None
        return repr([(entry.identity, entry.size) for _, entry in opened])
