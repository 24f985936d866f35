"""Spectra on disk, by the content of the weights: what was computed once is not computed again.

An entry belongs to a module's matrices (a hash of their bytes), the path to the eigenvalues and the version of this
code, and to no setting of the fit. So another `--fit`, a checkpoint in which only some tensors changed, and an
analysis that was interrupted all go on from what is there. Entries carry a checksum: one that is damaged is removed
and computed anew. The least recently used go first once all together are larger than the limit.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from esdtool.errors import OutputError
from esdtool.spectra.options import SpectrumPath
from esdtool.spectra.spectrum import Spectrum
from esdtool.support.files import atomic_write, cache_dir
from esdtool.support.sizes import parse_size

_MAGIC: Final = b"esdtool spectrum 1\n"
_HASH_BYTES: Final = 32
_SUFFIX: Final = ".esd"

_COMPUTATION: Final = 1
"""Raise it when the numbers change for the same weights: older entries are then never found again."""

DEFAULT_LIMIT: Final = 2 * 2**30
"""Bytes; `ESDTOOL_CACHE_SIZE` says otherwise."""


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """What the cache holds."""

    folder: Path
    entries: int
    bytes: int
    limit: int


@dataclass(frozen=True, kw_only=True)
class SpectrumCache:
    """A folder of spectra."""

    folder: Path
    limit: int
    """Bytes that all entries together may take, after `trim`."""

    @classmethod
    def of_user(cls) -> SpectrumCache:
        """The user's cache, with the limit of `ESDTOOL_CACHE_SIZE`.

        Raises:
            UsageError: if that is no size.
        """
        text = os.environ.get("ESDTOOL_CACHE_SIZE")
        return cls(folder=cache_dir() / "spectra", limit=DEFAULT_LIMIT if not text else parse_size(text))

    def load(self, key: str) -> Spectrum | None:
        """The entry of a key; None if there is none, or it is damaged, which removes it."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        spectrum = _decode(content)
        with suppress(OSError):  # another process may have removed it, or the folder may be read-only
            if spectrum is None:
                path.unlink()
            else:
                os.utime(path)  # used now: the last to go
        return spectrum

    def save(self, key: str, spectrum: Spectrum) -> None:
        """Keep a spectrum; a disk that is full or read-only is no error, since nothing is lost."""
        path = self._path(key)
        with suppress(OSError, OutputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                temporary.write_bytes(_encode(spectrum))

    def info(self) -> CacheInfo:
        """Number and size of the entries."""
        sizes = [size for _, _, size in self._entries()]
        return CacheInfo(folder=self.folder, entries=len(sizes), bytes=sum(sizes), limit=self.limit)

    def trim(self) -> None:
        """Remove the least recently used entries until the rest is within the limit."""
        entries = sorted(self._entries(), key=lambda entry: entry[1])
        total = sum(size for _, _, size in entries)
        for path, _, size in entries:
            if total <= self.limit:
                return
            with suppress(OSError):
                path.unlink()
            total -= size

    def clear(self) -> CacheInfo:
        """Remove all entries; returns what there was."""
        before = self.info()
        for path, _, _ in list(self._entries()):
            with suppress(OSError):
                path.unlink()
        return before

    def _path(self, key: str) -> Path:
        # A folder of 36,000 files is slow on some file systems.
        return self.folder / key[:2] / (key[2:] + _SUFFIX)

    def _entries(self) -> Iterator[tuple[Path, float, int]]:
        """(file, time of last use, size) of each entry."""
        for path in self.folder.glob(f"??/*{_SUFFIX}"):
            with suppress(OSError):
                status = path.stat()
                yield path, status.st_mtime, status.st_size


def content_hash(matrices: Sequence[torch.Tensor]) -> str:
    """Hash of the matrices' shapes, dtype and bytes.

    >>> eye = torch.eye(3)
    >>> content_hash([eye]) == content_hash([eye.clone()]), content_hash([eye]) == content_hash([2 * eye])
    (True, False)

    Args:
        matrices: tensors [rows, columns] of one shape on any device.
    """
    # Most CPUs have instructions for SHA-256: a gigabyte a second and more, a few per cent of a spectrum's time.
    digest = hashlib.sha256(f"{matrices[0].dtype} {[tuple(matrix.shape) for matrix in matrices]}".encode())
    for matrix in matrices:
        digest.update(matrix.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def entry_key(content: str, path: SpectrumPath, device: str, *settings: object) -> str:
    """Key of an entry.

    Args:
        content: `content_hash` of the matrices.
        path: to the eigenvalues.
        device: type of the device, since its last bits differ.
        settings: what else the eigenvalues depend on.
    """
    return hashlib.sha256(repr((_COMPUTATION, content, path, device, settings)).encode()).hexdigest()


def _encode(spectrum: Spectrum) -> bytes:
    """Magic line, checksum of what follows, length of the header, header, eigenvalues."""
    header = json.dumps(
        {"path": spectrum.path, "resolution": spectrum.resolution, "storage_floor": spectrum.storage_floor}
    ).encode()
    body = struct.pack("<I", len(header)) + header + spectrum.eigenvalues.astype("<f8").tobytes()
    return _MAGIC + hashlib.sha256(body).digest() + body


def _decode(content: bytes) -> Spectrum | None:
    """The spectrum; None if a byte is wrong."""
    start = len(_MAGIC) + _HASH_BYTES
    body = content[start:]
    if content[: len(_MAGIC)] != _MAGIC or hashlib.sha256(body).digest() != content[len(_MAGIC) : start]:
        return None
    (length,) = struct.unpack_from("<I", body)
    header = json.loads(body[4 : 4 + length])
    eigenvalues = np.frombuffer(body[4 + length :], dtype="<f8").astype(np.float64)
    return Spectrum(eigenvalues=eigenvalues, **header)
