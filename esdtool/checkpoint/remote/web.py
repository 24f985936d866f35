"""Files on a web server, through fsspec's HTTP filesystem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from esdtool.checkpoint.remote.faults import RangeError, is_absence
from esdtool.checkpoint.remote.ranges import Etags, check_answer, plain_etag, range_header
from esdtool.checkpoint.remote.store import Entry, RemoteStore

_CONNECT_SECONDS, _READ_SECONDS = 20.0, 30.0
"""How long to wait for a connection, and for the next bytes."""

_PIECE = 2**20


class WebStore(RemoteStore):
    """The files beside one another on a web server. It has no listings, and a query (`?token=...`) goes with each."""

    credentials = "put the server's password into ~/.netrc"
    has_listings = False

    def __init__(self, url: str) -> None:
        """Stand before the server of a URL."""
        super().__init__()
        import aiohttp
        from fsspec.implementations.http import HTTPFileSystem

        parts = urlsplit(url)
        self._scheme, self._host, self._query = parts.scheme, parts.netloc, parts.query
        # `trust_env` honours proxies and ~/.netrc.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        self._filesystem: Any = HTTPFileSystem(
            client_kwargs={"timeout": timeout, "trust_env": True}, skip_instance_cache=True
        )
        self._known: dict[str, Entry | None] = {}
        self._etags = Etags()

    def shown(self, key: str) -> str:
        """Return the URL without password and query."""
        return urlunsplit((self._scheme, self._host.rpartition("@")[2], f"/{key}", "", ""))

    def entry(self, key: str) -> Entry | None:
        """Ask for a file's size and etag (HEAD)."""
        if key not in self._known:
            self._known[key] = self._ask(key)
        return self._known[key]

    def entries(self, folder: str) -> Mapping[str, Entry]:  # noqa: ARG002 - it has none
        """Return nothing: a page of links is no listing."""
        return {}

    @contextmanager
    def stream(self, entry: Entry, start: int, stop: int) -> Iterator[Iterator[bytes]]:
        """Ask for a range, and look at the answer's head before its body."""
        # A stream of fsspec's (block size 0): its other ways of reading take whatever body comes into memory.
        headers = {**self._filesystem.kwargs.get("headers", {}), **range_header(start, stop)}
        opened = self._filesystem.open(self._url(entry.key), block_size=0, size=entry.size, headers=headers)
        with closing(opened):
            check_answer(opened.r.status, opened.r.headers, entry, start, stop)
            self._etags.check(entry.key, opened.r.headers.get("ETag"))
            yield iter(lambda: opened.read(_PIECE), b"")

    def _ask(self, key: str) -> Entry | None:
        try:
            info = self._filesystem.info(self._url(key))
        except FileNotFoundError as error:
            if is_absence(error):
                return None
            raise
        if info.get("size") is None:
            raise RangeError("the server does not tell the file's size, so that no range of it can be read")
        if info.get("partial") is False:
            raise RangeError("the server says that it sends no ranges of files")
        etag = info.get("ETag")
        self._etags.check(key, etag)
        identity = plain_etag(etag) if etag else info.get("Last-Modified")
        return Entry(key=key, size=info["size"], identity=identity and f"{self.shown(key)} {identity}")

    def _url(self, key: str) -> str:
        return urlunsplit((self._scheme, self._host, f"/{key}", self._query, ""))
