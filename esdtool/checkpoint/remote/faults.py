"""Tell what the errors of remote stores mean: whether to try again, and what to say to the user.

Each library has its own exceptions, and some hide one below another. What they have in common is looked for in the
whole chain: an HTTP status, or a type of Python's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from esdtool.checkpoint.limits import shortened
from esdtool.support.words import one_line

if TYPE_CHECKING:
    from esdtool.checkpoint.remote.store import RemoteStore

LONGEST_WAIT = 60.0
"""Seconds that a server may make us wait before the next attempt."""

_REASON_CHARACTERS = 200
_QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\")>]*", re.IGNORECASE)
_PASSWORD = re.compile(r"([a-z][a-z0-9+.-]*://)[^/@\s]+@", re.IGNORECASE)
_TOKEN = re.compile(r"\bhf_\w+|\b(?:Bearer|Basic)\s+\S+|\b(?:AKIA|ASIA)\w{12,}")
_TIMEOUTS = ("timeout", "timedout")
_MISSING = frozenset({"FileNotFoundError", "EntryNotFoundError", "RemoteEntryNotFoundError"})


class RangeError(Exception):
    """A server sent other bytes than were asked for. The message is for the user, as it stands."""


class ChangedError(Exception):
    """An object is not what it was when it was opened."""


class CutError(ConnectionError):
    """A connection ended before all bytes had come."""


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error, or what it was raised from, is about."""
    for at in _chain(error):
        response = getattr(at, "response", None)
        candidates = [getattr(at, "status", None), getattr(response, "status_code", None)]
        if isinstance(response, dict):  # botocore's
            candidates.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        for status in candidates:
            if isinstance(status, int) and 400 <= status < 600:
                return status
    return None


def is_absence(error: BaseException) -> bool:
    """Return whether an error says that there is nothing of that name, rather than that nobody answers."""
    status = status_of(error)
    if status is not None:
        return status in (404, 410)
    # fsspec calls every failure of a web server FileNotFoundError, and has the true one below it.
    chain = list(_chain(error))
    return type(chain[-1]).__name__ in _MISSING and not any(map(_is_transport, chain))


def may_pass(error: BaseException) -> bool:
    """Return whether to try again: the server is busy, or the connection was lost."""
    if isinstance(error, RangeError | ChangedError):
        return False
    status = status_of(error)
    if status is not None:
        return status in (408, 429, 500, 502, 503, 504)
    return any(map(_is_transport, _chain(error)))


def wait_asked_for(error: BaseException) -> float | None:
    """Return the seconds that a server asks us to wait (Retry-After), at most `LONGEST_WAIT`."""
    for at in _chain(error):
        headers: Any = getattr(at, "headers", None) or getattr(getattr(at, "response", None), "headers", None) or {}
        value = headers.get("Retry-After") if hasattr(headers, "get") else None
        if isinstance(value, str) and value.isascii() and value.isdecimal():
            return min(float(value), LONGEST_WAIT)
    return None


def said(error: BaseException, store: RemoteStore) -> str:
    """Say in one line why a store does not give what was asked for, and what to do."""
    if isinstance(error, RangeError):
        return f"{error}; {store.copy}"
    if isinstance(error, ChangedError):
        return "the file was replaced by another since it was opened; run again once nothing changes the checkpoint"
    status = status_of(error)
    if status == 401:
        return f"not authorised (401); {store.credentials}"
    if status == 403:
        return f"access denied (403); {store.credentials}"
    if status in (404, 410):
        return f"no such file ({status})"
    if status == 416:
        return "the file is shorter than it was said to be (416); run again once nothing changes the checkpoint"
    if status == 429:
        return "the server asks for fewer requests (429); wait a while and run again: what is computed is kept"
    if status is not None and status >= 500:
        return f"the server fails ({status}); run again later: what is computed is kept"
    chain = list(_chain(error))
    if any(_is_timeout(at) for at in chain):
        return "the server is too slow, or does not answer; run again later: what is computed is kept"
    if is_absence(error):
        return "no such file"
    if any(type(at).__name__ in ("NoCredentialsError", "PartialCredentialsError") for at in chain):
        return f"no credentials; {store.credentials}"
    if isinstance(error, PermissionError):
        return f"access denied; {store.credentials}"
    lost = next(filter(_is_transport, chain), None)
    told = chain[-1] if lost is None else lost
    reason = redacted(f"{type(told).__name__}: {one_line(told)}")
    if lost is not None:
        return f"the connection was lost ({reason}); run again: what is computed is kept"
    return reason


def redacted(text: str) -> str:
    """Take passwords, tokens and signatures out of a text.

    >>> redacted("GET https://me:secret@host/x?X-Amz-Signature=1 with hf_abc")
    'GET https://host/x?... with ***'
    """
    return shortened(_TOKEN.sub("***", _PASSWORD.sub(r"\1", _QUERY.sub(r"\1?...", text))), _REASON_CHARACTERS)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, the cause at the end."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__


def _is_timeout(error: BaseException) -> bool:
    name = type(error).__name__.lower()
    return isinstance(error, TimeoutError) or any(word in name for word in _TIMEOUTS)


def _is_transport(error: BaseException) -> bool:
    """Return whether an error is of the connection. The libraries' own names are looked for in all base classes."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(
        names
        & {
            "TransportError",  # httpx
            "ClientConnectionError",  # aiohttp
            "ClientPayloadError",
            "HTTPClientError",  # botocore
            "FSTimeoutError",
            "IncompleteRead",
            "IncompleteReadError",
        }
    )
