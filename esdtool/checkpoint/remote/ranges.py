"""Check what an HTTP server answers to a request for a range, before its body is read."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping

from esdtool.checkpoint.remote.faults import ChangedError, RangeError
from esdtool.checkpoint.remote.store import Entry

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


class Etags:
    """The etags that a server gave for each object first: they must stay the same."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}
        self._lock = threading.Lock()

    def check(self, key: str, etag: str | None) -> None:
        """Compare an answer's etag with the first one.

        Raises:
            ChangedError: if it is another.
        """
        if etag is None:
            return
        with self._lock:
            first = self._seen.setdefault(key, plain_etag(etag))
        if plain_etag(etag) != first:
            raise ChangedError


def plain_etag(etag: str) -> str:
    """Return an etag without its quotes and the mark of a weak one.

    >>> plain_etag('W/"abc"')
    'abc'
    """
    return etag.strip().removeprefix("W/").strip('"')


def range_header(start: int, stop: int) -> dict[str, str]:
    """Return the headers that ask for the bytes from `start` to before `stop`, as they are stored.

    >>> range_header(0, 8)
    {'Range': 'bytes=0-7', 'Accept-Encoding': 'identity'}
    """
    return {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}


def check_answer(status: int, headers: Mapping[str, str], entry: Entry, start: int, stop: int) -> None:
    """Check that an answer brings the bytes from `start` to before `stop`.

    Raises:
        RangeError: if it brings others, or a whole file of which a part was asked for.
        ChangedError: if the object has another size than it had.
    """
    if headers.get("Content-Encoding", "identity") not in ("identity", ""):
        raise RangeError("the server compresses what it sends, so that no range of it can be read")
    if status == 200:
        if (start, stop) == (0, entry.size):
            length = headers.get("Content-Length")
            if length is not None and length != str(entry.size):
                raise ChangedError
            return
        raise RangeError(
            f"the server ignores the range that was asked for, and sends the whole file ({entry.size} bytes)"
        )
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    if status != 206 or found is None:
        raise RangeError(f"the server answers a request for a range with status {status} and without a range")
    if found[3] != "*" and int(found[3]) != entry.size:
        raise ChangedError
    if int(found[1]) != start or not start <= int(found[2]) < stop:
        raise RangeError("the server sends another range of bytes than it was asked for")
