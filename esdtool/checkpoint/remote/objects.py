"""Objects in whatever store fsspec has a filesystem for: `s3://`, `gs://`, `az://`, `memory://`, chains of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from esdtool.checkpoint.remote.faults import ChangedError, redacted
from esdtool.checkpoint.remote.store import Entry, RemoteStore

_PIECE = 8 * 2**20
"""Bytes of one request: what is fetched again after a cut, and what is in memory twice."""

_IDENTITIES = (
    "ETag", "etag", "e_tag", "generation", "md5", "md5Hash", "checksum", "LastModified", "last_modified", "mtime",
    "created",
)  # fmt: skip
"""What filesystems call that which changes with an object's content, the most telling first."""


class ObjectStore(RemoteStore):
    """A filesystem of fsspec."""

    credentials = "check your credentials for the store, and the settings of its fsspec filesystem"

    def __init__(self, filesystem: Any, scheme: str) -> None:
        """Look at an fsspec filesystem; `scheme` is how its URLs begin, for messages."""
        super().__init__()
        self._filesystem = filesystem
        self._scheme = scheme
        self._known: dict[str, Entry | None] = {}

    def shown(self, key: str) -> str:
        """Return the URL without a password."""
        return redacted(f"{self._scheme}://{key.lstrip('/')}")

    def entry(self, key: str) -> Entry | None:
        """Ask for an object's size and identity."""
        if key not in self._known:
            self._known[key] = self._ask(key)
        return self._known[key]

    def entries(self, folder: str) -> Mapping[str, Entry]:
        """List a folder."""
        found = {}
        for info in self._filesystem.ls(folder, detail=True):
            name = str(info["name"]).rstrip("/").rpartition("/")[2]
            if name:
                found[name] = self._entry(f"{folder}/{name}", info)
        return found

    @contextmanager
    def stream(self, entry: Entry, start: int, stop: int) -> Iterator[Iterator[bytes]]:
        """Ask for the bytes, some megabytes at a time."""
        yield self._pieces(entry, start, stop)

    def confirm(self, entry: Entry) -> None:
        """Ask for the object's identity once more: its bytes come without it."""
        self._filesystem.invalidate_cache()
        now = self._ask(entry.key)
        if now is None or (now.size, now.identity) != (entry.size, entry.identity):
            raise ChangedError

    def _pieces(self, entry: Entry, start: int, stop: int) -> Iterator[bytes]:
        for begin in range(start, stop, _PIECE):
            wanted = min(_PIECE, stop - begin)
            piece = self._filesystem.cat_file(entry.key, start=begin, end=begin + wanted)
            yield piece
            if len(piece) < wanted:
                return  # whoever asked goes on from here

    def _ask(self, key: str) -> Entry | None:
        try:
            info = self._filesystem.info(key)
        except FileNotFoundError:
            return None
        return self._entry(key, info)

    def _entry(self, key: str, info: Mapping[str, Any]) -> Entry:
        is_folder = info.get("type") == "directory"
        identity = next((f"{name} {info[name]}" for name in _IDENTITIES if info.get(name)), None)
        return Entry(
            key=key,
            is_folder=is_folder,
            size=int(info.get("size") or 0),
            identity=None if is_folder or identity is None else f"{self.shown(key)} {identity}",
        )
