"""Objects in S3 and what speaks its protocol, through s3fs: the head of each answer is looked at before its body."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from esdtool.checkpoint.remote.faults import ChangedError
from esdtool.checkpoint.remote.objects import ObjectStore
from esdtool.checkpoint.remote.ranges import check_answer, plain_etag, range_header
from esdtool.checkpoint.remote.store import Entry

_PIECE = 2**20
"""Bytes of one read."""


class S3Store(ObjectStore):
    """A filesystem of s3fs.

    Its `cat_file` takes whatever body comes into memory. So an object is asked for by a call of the protocol
    (GetObject), whose answer says of which version it is, and the body is read as it arrives.
    """

    @contextmanager
    def stream(self, entry: Entry, start: int, stop: int) -> Iterator[Iterator[bytes]]:
        """Ask for a range, and look at the answer's head before its body."""
        from fsspec.asyn import sync

        filesystem = self._filesystem
        bucket, key, version = filesystem.split_path(entry.key)
        named = {"Bucket": bucket, "Key": key, **({} if version is None else {"VersionId": version})}
        answer = filesystem.call_s3(
            "get_object", **named, Range=range_header(start, stop)["Range"], **getattr(filesystem, "req_kw", {})
        )
        body: Any = answer["Body"]

        async def leave() -> None:
            body.close()

        try:
            told = answer["ResponseMetadata"]
            headers = {name.title(): value for name, value in told["HTTPHeaders"].items()}
            check_answer(told["HTTPStatusCode"], headers, entry, start, stop)
            if not self._is_same(answer.get("ETag"), entry):
                raise ChangedError
            yield iter(lambda: sync(filesystem.loop, body.read, _PIECE), b"")
        finally:
            sync(filesystem.loop, leave)

    def confirm(self, entry: Entry) -> None:
        """Ask for the identity once more only where answers do not tell it."""
        if entry.identity is None or " ETag " not in entry.identity:
            super().confirm(entry)

    def _is_same(self, etag: str | None, entry: Entry) -> bool:
        """Tell whether an answer is of the object that was opened, as far as it says."""
        told = (entry.identity or "").rpartition(" ETag ")[2]
        return not etag or not told or plain_etag(etag) == plain_etag(told)
