"""Checkpoints by URL: of the Hub (`hf://`), on web servers, and in whatever store fsspec has a filesystem for."""

from __future__ import annotations

import re
from dataclasses import replace
from urllib.parse import urlsplit

from esdtool.checkpoint.base import Checkpoint
from esdtool.checkpoint.byte_source import AccessError
from esdtool.checkpoint.local import open_directory, open_file
from esdtool.checkpoint.remote.faults import redacted, said
from esdtool.checkpoint.remote.path import RemotePath
from esdtool.checkpoint.remote.store import RemoteStore
from esdtool.errors import CheckpointError, MissingExtraError, UsageError
from esdtool.support.words import one_line

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
"""Packages with the filesystems that fsspec does not have itself."""


def is_url(text: str) -> bool:
    """Return whether a location is a URL rather than a path.

    >>> [is_url(text) for text in ("s3://bucket/model", "simplecache::https://x/y", "org/name", "C:/model")]
    [True, True, False, False]
    """
    return _URL.match(text) is not None


def open_url(url: str, *, revision: str | None = None) -> Checkpoint:
    """Open a folder or a file in a remote store; only headers are read.

    Raises:
        MissingExtraError: if the packages for the store are not installed.
        CheckpointError: if there is nothing to read, it is broken or unsafe, or the store does not answer.
        UsageError: if `revision` is given, which is for the Hub.
    """
    location = redacted(url)
    if revision is not None:
        raise UsageError(f"{location}: a URL of this kind has no revision {revision!r}; that is for Hub ids")
    root = _place(url, location)
    return replace(open_place(root, location=location), location=location)


def open_place(place: RemotePath, *, location: str) -> Checkpoint:
    """Open a folder or a file in a store.

    Raises:
        CheckpointError: as `open_url`.
    """
    if place.is_dir():
        return open_directory(place)
    if not place.is_file():
        raise CheckpointError(f"{location}: no such file or folder")
    return open_file(place)


def _place(url: str, location: str) -> RemotePath:
    """Find the store of a URL, and the place there."""
    scheme = url.partition("://")[0].lower()
    try:
        if scheme in ("http", "https"):
            from esdtool.checkpoint.remote.web import WebStore

            return RemotePath(key=urlsplit(url).path.strip("/"), store=WebStore(url))
        from fsspec.core import url_to_fs

        from esdtool.checkpoint.remote.objects import ObjectStore
        from esdtool.checkpoint.remote.s3 import S3Store
    except ImportError as error:
        raise MissingExtraError(f"{location}: reading a URL", "remote") from error
    try:
        filesystem, key = url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        if package is None:
            raise CheckpointError(f"{location}: {one_line(error)}") from error
        raise CheckpointError(
            f"{location}: reading from {scheme}:// needs the package {package}: pip install {package}"
        ) from error
    except ValueError as error:  # no such protocol, or a URL that is none
        raise CheckpointError(f"{location}: {redacted(one_line(error))}") from error
    except Exception as error:
        store: RemoteStore = ObjectStore(None, scheme)
        raise AccessError(location, said(error, store)) from error
    kind = S3Store if scheme in ("s3", "s3a") else ObjectStore
    return RemotePath(key=str(key).rstrip("/"), store=kind(filesystem, scheme))
