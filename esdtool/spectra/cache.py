"""Spectra on disk, by the content of the weights: what was computed once is not computed again.

An entry belongs to a module's matrices (a hash of their bytes), the path to the eigenvalues and the version of this
code, and to no setting of the fit. So another `--fit`, a checkpoint in which only some tensors changed, and an
analysis that was interrupted all go on from what is there. An entry is a safetensors file that also holds its own key
and a checksum: one that is damaged, or that lies under another's name, is removed and computed again. The least
recently used go first once all together are larger than the limit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from esdtool.errors import OutputError
from esdtool.spectra.options import Solver, SpectrumPath
from esdtool.spectra.spectrum import Spectrum
from esdtool.support.files import atomic_write, atomic_write_text, cache_directory
from esdtool.support.sizes import parse_size

_SUFFIX: Final = ".esd"
"""Suffix of the entries, those of earlier versions included, which are never found again and go first."""

_FACTS_SUFFIX: Final = ".facts"
"""Suffix of the files that say what is known of matrices by their source."""

_TENSOR: Final = "eigenvalues"

_COMPUTATION: Final = 2
"""Raise it when the numbers change for the same weights: older entries are then never found again."""

_DAMAGE: Final = (OSError, SafetensorError, ValueError, TypeError, KeyError)
"""What reading an entry can raise if the file is not as it was written."""

DEFAULT_LIMIT: Final = 2 * 2**30
"""Bytes; `ESDTOOL_CACHE_SIZE` says otherwise."""


class _Facts(BaseModel):
    """The metadata of an entry, stored with the eigenvalues."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    key: str
    """The entry's own, so that one under another's name is noticed."""
    num_eigs: int
    path: SpectrumPath
    solver: Solver
    resolution: float
    storage_floor: float
    exponent: int


class MatrixFacts(BaseModel):
    """Describe a module's matrices without their data."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    content: str
    """`content_hash` of them."""
    shape: tuple[int, int]
    """(rows, columns) of each."""
    count: int
    dtype: str
    """Name of the type without the `torch.` prefix, e.g. `bfloat16`."""
    roundoff: float | None
    """Relative rounding error of the stored weights, where it is more than that of the dtype."""
    relative_distance: float | None = None
    """The Frobenius norm of a difference over that of the base."""


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """The contents of the cache."""

    folder: Path
    entries: int
    bytes: int
    limit: int


@dataclass(frozen=True, kw_only=True)
class SpectrumCache:
    """A folder of spectra that several processes may use at a time."""

    folder: Path
    limit: int
    """Bytes that all entries together may take, after `trim`."""

    @classmethod
    def of_user(cls) -> SpectrumCache:
        """Return the user's cache, with the limit of `ESDTOOL_CACHE_SIZE`.

        Raises:
            UsageError: if that is no size.
        """
        text = os.environ.get("ESDTOOL_CACHE_SIZE")
        return cls(folder=cache_directory() / "spectra", limit=DEFAULT_LIMIT if not text else parse_size(text))

    def load(self, key: str) -> Spectrum | None:
        """Return the entry of a key; None if there is none, or it is damaged, which removes it."""
        path = self._path(key)
        try:
            spectrum = _read(path, key)
        except FileNotFoundError:
            return None
        except _DAMAGE:
            spectrum = None
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
                facts = _Facts(
                    key=key,
                    num_eigs=spectrum.eigenvalues.size,
                    path=spectrum.path,
                    solver=spectrum.solver,
                    resolution=spectrum.resolution,
                    storage_floor=spectrum.storage_floor,
                    exponent=spectrum.exponent,
                ).model_dump_json()
                metadata = {"facts": facts, "sha256": _checksum(facts, spectrum.eigenvalues)}
                save_file({_TENSOR: spectrum.eigenvalues}, temporary, metadata=metadata)

    def recall(self, key: str) -> MatrixFacts | None:
        """Return what `remember` kept under a key; None if there is nothing, or it is damaged, which removes it."""
        path = self._path(key, _FACTS_SUFFIX)
        try:
            stated, _, text = path.read_text(encoding="utf-8").partition("\n")
            if stated != hashlib.sha256(f"{key}\n{text}".encode()).hexdigest():
                raise ValueError("the checksum does not fit")
            facts = MatrixFacts.model_validate_json(text)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return facts

    def remember(self, key: str, facts: MatrixFacts) -> None:
        """Keep what is known of some matrices under what identifies their source; as with `save`, failing is no error.

        Args:
            key: a hexadecimal hash.
            facts: what to keep.
        """
        path, text = self._path(key, _FACTS_SUFFIX), facts.model_dump_json()
        with suppress(OSError, OutputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, hashlib.sha256(f"{key}\n{text}".encode()).hexdigest() + "\n" + text)

    def load_note(self, key: str) -> str | None:
        """Return the text that was kept for a key; None if there is none, or it is damaged, which removes it."""
        path = self._path(key, _FACTS_SUFFIX)
        try:
            checksum, _, text = path.read_text(encoding="utf-8").partition("\n")
        except (OSError, UnicodeDecodeError):
            return None
        with suppress(OSError):
            if checksum != _note_checksum(key, text):
                path.unlink()
                return None
            os.utime(path)
        return text

    def save_note(self, key: str, text: str) -> None:
        """Keep a short text beside the spectra; a disk that is full or read-only is no error."""
        path = self._path(key, _FACTS_SUFFIX)
        with suppress(OSError, OutputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, f"{_note_checksum(key, text)}\n{text}")

    def info(self) -> CacheInfo:
        """Count the entries and their bytes."""
        sizes = [size for _, _, size in self._entries(_SUFFIX)]
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
        """Remove all entries and return what there was."""
        before = self.info()
        for path, _, _ in list(self._entries()):
            with suppress(OSError):
                path.unlink()
        return before

    def _path(self, key: str, suffix: str = _SUFFIX) -> Path:
        # A folder of 36,000 files is slow on some file systems.
        return self.folder / key[:2] / (key[2:] + suffix)

    def _entries(self, *suffixes: str) -> Iterator[tuple[Path, float, int]]:
        """Yield file, time of last use and size of each entry, by default of both kinds."""
        for suffix in suffixes or (_SUFFIX, _FACTS_SUFFIX):
            for path in self.folder.glob(f"??/*{suffix}"):
                with suppress(OSError):
                    status = path.stat()
                    yield path, status.st_mtime, status.st_size


def content_hash(matrices: Sequence[torch.Tensor]) -> str:
    """Hash the matrices' shapes, dtype and bytes.

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
    """Make the key of an entry.

    Args:
        content: `content_hash` of the matrices.
        path: to the eigenvalues.
        device: type of the device, since its last bits differ.
        settings: what else the eigenvalues depend on.
    """
    return hashlib.sha256(repr((_COMPUTATION, content, path, device, settings)).encode()).hexdigest()


def note_key(what: str, version: int, content: str, *settings: object) -> str:
    """Make the key of a text.

    Args:
        what: what the text says of the matrices.
        version: of the code that computes it.
        content: `content_hash` of the matrices.
        settings: what else it depends on.
    """
    return hashlib.sha256(repr((what, version, content, settings)).encode()).hexdigest()


def _note_checksum(key: str, text: str) -> str:
    return hashlib.sha256(f"{key}\0{text}".encode()).hexdigest()


def _checksum(facts: str, eigenvalues: npt.NDArray[np.float64]) -> str:
    return hashlib.sha256(facts.encode() + b"\0" + np.ascontiguousarray(eigenvalues).tobytes()).hexdigest()


def _read(path: Path, key: str) -> Spectrum:
    """Read an entry.

    Raises:
        FileNotFoundError: if there is none.
        OSError, SafetensorError, ValueError, TypeError, KeyError: if it is damaged, or of another key.
    """
    with safe_open(path, framework="numpy") as file:
        metadata, eigenvalues = file.metadata(), file.get_tensor(_TENSOR)
    if eigenvalues.dtype != np.float64 or eigenvalues.ndim != 1:
        raise ValueError("no vector of eigenvalues")
    if metadata["sha256"] != _checksum(metadata["facts"], eigenvalues):
        raise ValueError("the checksum does not fit")
    facts = _Facts.model_validate_json(metadata["facts"])
    if (facts.key, facts.num_eigs) != (key, eigenvalues.size) or not np.isfinite(eigenvalues).all():
        raise ValueError("the entry is of another key")
    return Spectrum(eigenvalues=eigenvalues, **facts.model_dump(exclude={"key", "num_eigs"}))
