"""`.safetensors` files: 8 bytes of header length (little endian), a JSON header, then the data.

The header is read here rather than by the library `safetensors`, which maps the file into memory: where a mapped file
becomes shorter, the process is ended. What is accepted is what the library accepts.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esdtool.checkpoint.base import TensorInfo
from esdtool.checkpoint.container import Container, WeightFile
from esdtool.checkpoint.limits import HEADER_BYTES, shortened
from esdtool.checkpoint.raw_bytes import elements
from esdtool.checkpoint.stored_file import StoredFile
from esdtool.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "F4": ("float4_e2m1fn", 4),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
    "C64": ("complex64", 64),
}
"""torch's name and the bits of an element, by the format's name."""

_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_UNREADABLE = frozenset({"F6_E2M3", "F6_E3M2", "F4"})
"""Elements of less than a byte, for which torch has no dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """One tensor of the header."""

    shape: tuple[int, ...]
    type: str
    """In the format's own words."""
    start: int
    """Byte in the data."""
    stop: int


class SafetensorsFile(WeightFile):
    """A `.safetensors` file, known by its header."""

    def __init__(self, file: StoredFile, label: str) -> None:
        """Read the header of a file; `label` is its name within the checkpoint.

        Raises:
            CheckpointError: if the header and the data do not fit together.
        """
        self._path = file.path
        header, self._begin = _read_header(file)
        self._entries = _entries(file, header, file.size - self._begin)
        self._file = file
        self.tensors = {
            name: TensorInfo(name=name, shape=entry.shape, dtype=_DTYPES[entry.type][0], file=label)
            for name, entry in self._entries.items()
        }

    def stretch(self, name: str) -> StoredFile:
        """Return the bytes of one tensor."""
        entry = self._entries[name]
        return self._file.part(self._begin + entry.start, entry.stop - entry.start)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read one tensor, or some rows of it. Several threads may read at a time."""
        entry = self._entries[name]
        if entry.type in _UNREADABLE:
            raise CheckpointError(f"{self._path}: tensor {name!r}: cannot read: Dtype not understood: {entry.type}")
        shape, start, stop = entry.shape, entry.start, entry.stop
        if rows is not None and shape:
            first, last, _ = rows.indices(shape[0])
            each = (stop - start) // shape[0] if shape[0] else 0
            shape = (max(first, last) - first, *shape[1:])
            start, stop = start + first * each, start + max(first, last) * each
        data = self._file.read(self._begin + start, stop - start)
        return elements(data, _DTYPES[entry.type][0]).reshape(shape)


def _read_header(file: StoredFile) -> tuple[dict[str, Any], int]:
    """(the JSON object, the byte at which the data begin)."""
    head = file.head
    if file.size < _LENGTH_BYTES:
        raise CheckpointError(
            f"{file.path}: truncated: {file.size} bytes are too few for a safetensors header; download or copy it again"
        )
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if length > HEADER_BYTES:
        raise CheckpointError(
            f"{file.path}: not a safetensors file: it claims a header of {length} bytes (limit {HEADER_BYTES})"
        )
    if _LENGTH_BYTES + length > file.size:
        raise CheckpointError(
            f"{file.path}: truncated: its header takes {_LENGTH_BYTES + length} bytes but the file has {file.size}; "
            "download or copy it again"
        )
    text = file.read(_LENGTH_BYTES, length).tobytes()
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_repetition, parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{file.path}: not a safetensors file: its header is not UTF-8 text at byte {_LENGTH_BYTES + error.start}"
        ) from error
    except _RepeatedKeyError as error:
        raise CheckpointError(f"{file.path}: damaged header: {shortened(str(error))} is listed twice") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path}: not a safetensors file: its header is not valid JSON") from error
    if not text.startswith(b"{") or not isinstance(header, dict):
        raise CheckpointError(f"{file.path}: not a safetensors file: its header is no JSON object")
    return header, _LENGTH_BYTES + length


class _RepeatedKeyError(Exception):
    """A JSON object with two entries of one name."""


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _RepeatedKeyError(repr(counts.most_common(1)[0][0]))
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _entries(file: StoredFile, header: Mapping[str, Any], size: int) -> dict[str, _Entry]:
    """Return the tensors in a header by name, in alphabetical order. They must fill the data without gaps.

    Raises:
        CheckpointError: if they do not.
    """
    metadata = header.get(_METADATA)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(f"{file.path}: damaged header: {_METADATA} is no object of texts")
    entries = {name: _entry(file, name, value) for name, value in header.items() if name != _METADATA}
    needed = max((entry.stop for entry in entries.values()), default=0)
    whole = file.size - size + needed
    if needed > size:
        raise CheckpointError(
            f"{file.path}: truncated: its header promises {whole} bytes but the file has {file.size}; "
            "download or copy it again"
        )
    if needed < size:
        raise CheckpointError(
            f"{file.path}: damaged: the file has {file.size} bytes but its header describes {whole}; "
            "download or copy it again"
        )
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    position = 0
    for name, entry in ordered:
        if entry.start != position:
            raise CheckpointError(f"{file.path}: damaged header: invalid offset for tensor `{shortened(name)}`")
        if math.prod(entry.shape) * _DTYPES[entry.type][1] != (entry.stop - entry.start) * 8:
            raise CheckpointError(
                f"{file.path}: damaged header: invalid shape, data type, or offset for tensor `{shortened(name)}`"
            )
        position = entry.stop
    return dict(sorted(entries.items()))


def _entry(file: StoredFile, name: str, value: Any) -> _Entry:
    """Return one tensor's description, of which nothing is known."""
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or not isinstance(shape, list)
        or not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, *offsets))
    ):
        raise CheckpointError(f"{file.path}: damaged header: tensor `{shortened(name)}` is not described")
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"{file.path}: tensor {shortened(name)!r}: unknown data type {shortened(dtype)!r}; is esdtool too old?"
        )
    return _Entry(shape=tuple(shape), type=dtype, start=offsets[0], stop=offsets[1])


CONTAINER = Container(
    kind="a safetensors file",
    suffixes=(".safetensors",),
    open=SafetensorsFile,
    precedence=0,
    foreign=False,
    quantizes=False,
)
