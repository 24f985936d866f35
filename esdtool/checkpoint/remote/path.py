"""A place in a remote store, with as much of the interface of `pathlib.Path` as the readers of checkpoints use."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TypeVar

from esdtool.checkpoint.byte_source import AccessError, ByteSource
from esdtool.checkpoint.local_bytes import LocalBytes
from esdtool.checkpoint.remote.faults import said
from esdtool.checkpoint.remote.store import Entry, RemoteStore
from esdtool.checkpoint.remote.transfer import RemoteBytes, patiently

_TOGETHER = 16
"""Requests that are made of a store at a time."""

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True, order=True)
class RemotePath:
    """The place of a folder or an object. What is asked of the store raises `AccessError` if there is no answer."""

    key: str
    """Name in the store; empty for its root."""
    store: RemoteStore = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.store.shown(self.key)

    def __truediv__(self, name: str) -> RemotePath:
        return replace(self, key=f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """Last segment."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """End of the name from its last dot on."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder that it lies in."""
        return replace(self, key=self.key.rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        """Return the place of that name in the same folder."""
        return self.parent / name

    def absolute(self) -> RemotePath:
        """Return itself: no place in a store is relative to another."""
        return self

    def exists(self) -> bool:
        """Return whether there is something of that name."""
        return self._entry() is not None

    def is_file(self) -> bool:
        """Return whether it is an object."""
        entry = self._entry()
        return entry is not None and not entry.is_folder

    def is_dir(self) -> bool:
        """Return whether it is a folder."""
        entry = self._entry()
        return entry is not None and entry.is_folder

    @property
    def is_on_disk(self) -> bool:
        """Whether a library keeps a copy on this machine."""
        return self.store.local(self.key) is not None

    def iterdir(self) -> Iterator[RemotePath]:
        """List a folder.

        Raises:
            OSError: if the store has no listings.
        """
        if not self.store.has_listings:
            raise OSError(errno.EOPNOTSUPP, "the store has no listings of folders; name a file")
        with self._answers():
            names = patiently(lambda: self.store.entries(self.key))
        return (self / name for name in sorted(names))

    def bytes(self) -> ByteSource:
        """Return the object's bytes, from the copy that a library keeps on this machine where there is one."""
        entry = self._entry()
        if entry is None:
            raise AccessError(self, "no such file")
        if entry.is_folder:
            raise AccessError(self, "not a regular file")
        self.store.note_opened(entry)
        copy = self.store.local(self.key)
        if copy is not None:
            found = LocalBytes.at(copy, fingerprint=entry.identity)
            if found.size == entry.size:
                return found
        return RemoteBytes(path=self, store=self.store, entry=entry, size=entry.size, fingerprint=entry.identity)

    def _entry(self) -> Entry | None:
        with self._answers():
            return patiently(lambda: self.store.entry(self.key))

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Say in one line why a store does not answer."""
        try:
            yield
        except Exception as error:
            raise AccessError(self, said(error, self.store)) from error


def side_by_side(look: Callable[[Item], Found], items: Sequence[Item], *, of: object) -> list[Found]:
    """Do the same for several files: in a remote store many at a time, since each answer takes a while to come.

    Args:
        look: called for each item, in several threads if the folder is remote.
        items: what to do it for.
        of: the folder.

    Raises:
        Exception: the first that a call raises; what has not begun is dropped.
    """
    if not isinstance(of, RemotePath) or len(items) < 2:
        return [look(item) for item in items]
    pool = ThreadPoolExecutor(min(_TOGETHER, len(items)), "esdtool-remote")
    try:
        return list(pool.map(look, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
