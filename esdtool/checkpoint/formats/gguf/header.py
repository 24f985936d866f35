"""The header of a GGUF file: its metadata and where its tensors lie, without the tokenizer's long lists."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from esdtool.checkpoint.limits import HEADER_BYTES, ITEMS
from esdtool.checkpoint.stored_file import StoredFile
from esdtool.errors import CheckpointError
from esdtool.support.words import visible

_MAGIC = b"GGUF"

_CHUNK = 2**20

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata value types by number, as `struct` spells them."""

_STRING = 8

_ARRAY = 9

_LONGEST_LIST = 4096
"""Arrays of numbers up to this length are read (sizes layer by layer); others, the vocabulary's above all, are not."""

_MOST_DIMENSIONS = 4

_DEFAULT_ALIGNMENT = 32

_DEEPEST_ARRAY = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """The place and the type of one stored tensor."""

    file: StoredFile
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    """Dimensions as stored, slowest first."""
    type: str
    """ggml's name of the type, e.g. `Q4_K`."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """The metadata of a file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorRecord]


class _DamageError(Exception):
    """A header is invalid. The message does not name the file."""


class _Cursor:
    """Reads forwards through a header, as much of the file as it needs and the budget allows."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._limit = min(size, HEADER_BYTES)
        self._is_cut = size > HEADER_BYTES
        self._data = bytearray()
        self._items = 0
        self.position = 0

    def skip(self, count: int) -> None:
        """Move forwards over bytes that are there.

        Raises:
            EOFError: if the file ends before.
            _DamageError: if the header is longer than any.
        """
        self.position += count
        if self.position > self._limit:
            if self._is_cut:
                raise _DamageError(f"a header of more than {HEADER_BYTES} bytes")
            raise EOFError
        while len(self._data) < self.position:
            chunk = self._file.read(max(_CHUNK, self.position - len(self._data)))
            if not chunk:
                raise EOFError
            self._data += chunk

    def count(self, items: int = 1) -> None:
        """Note that so many entries follow.

        Raises:
            _DamageError: if there are more than any header has.
        """
        self._items += items
        if self._items > ITEMS:
            raise _DamageError(f"more than {ITEMS} entries")

    def numbers(self, letters: str) -> tuple[Any, ...]:
        """Read numbers, by their letters of `struct`."""
        layout = "<" + letters
        start = self.position
        self.skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, start)

    def text(self) -> str:
        """Read a length and as many bytes of UTF-8."""
        (length,) = self.numbers("Q")
        start = self.position
        self.skip(length)
        return self._data[start : self.position].decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read a value of the metadata; None for an array that is passed over."""
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _DamageError(f"metadata of unknown type {kind}")
        if depth > _DEEPEST_ARRAY:
            raise _DamageError("arrays nested too deeply")
        item, length = self.numbers("IQ")
        if item in _SCALARS:
            if length <= _LONGEST_LIST:
                return list(self.numbers(f"{length}{_SCALARS[item]}"))
            self.skip(length * struct.calcsize("<" + _SCALARS[item]))
            return None
        for _ in range(length):
            self.count()
            if item == _STRING:
                self.skip(self.numbers("Q")[0])
            else:
                self.value(item, depth + 1)
        return None


def read_header(file: StoredFile, types: Mapping[int, tuple[str, int, int]]) -> Header:
    """Read the header of one file.

    Args:
        file: the file.
        types: name, elements and bytes of a block, by ggml's number of the type.

    Raises:
        CheckpointError: if it is truncated, damaged, or of a version that is not read.
    """
    if not file.head.startswith(_MAGIC):
        raise CheckpointError(f"{file.path}: not a GGUF file: it does not begin with {_MAGIC.decode()!r}")
    try:
        with file.open() as plain:
            return _parse(file, _Cursor(plain, file.size), types)
    except EOFError as error:
        raise CheckpointError(f"{file.path}: truncated within its header; download or copy it again") from error
    except (_DamageError, ValueError, OverflowError, struct.error) as error:
        raise CheckpointError(
            f"{file.path}: damaged GGUF header: {visible(str(error))}; download or copy it again"
        ) from error


def _parse(file: StoredFile, cursor: _Cursor, types: Mapping[int, tuple[str, int, int]]) -> Header:
    cursor.skip(len(_MAGIC))
    (version,) = cursor.numbers("I")
    if version not in (2, 3):
        why = "big-endian" if version & 0xFFFF == 0 else f"GGUF version {version}"
        raise CheckpointError(f"{file.path}: {why}, which is not read; convert the model again with llama.cpp")
    count, pairs = cursor.numbers("QQ")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        cursor.count()
        key = cursor.text()
        if key in metadata:
            raise _DamageError(f"key {key!r} is listed twice")
        metadata[key] = cursor.value(cursor.numbers("I")[0])
    records: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(count):
        cursor.count()
        name = cursor.text()
        (dimensions,) = cursor.numbers("I")
        if dimensions > _MOST_DIMENSIONS:
            raise _DamageError(f"tensor {name!r} has {dimensions} dimensions")
        shape = cursor.numbers(f"{dimensions}Q")[::-1]
        records.append((name, shape, *cursor.numbers("IQ")))
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise _DamageError(f"alignment {alignment!r} is no power of 2")
    base = _padded(cursor.position, alignment)
    return Header(metadata=metadata, tensors=_place(file, records, types, base, alignment))


def _place(
    file: StoredFile,
    records: list[tuple[str, tuple[int, ...], int, int]],
    types: Mapping[int, tuple[str, int, int]],
    base: int,
    alignment: int,
) -> dict[str, TensorRecord]:
    """Find the place of each tensor. As llama.cpp demands, they follow one another, each padded to the alignment.

    Raises:
        CheckpointError: if one ends beyond the file.
        _DamageError: if one lies elsewhere, or is described wrongly.
    """
    placed: dict[str, TensorRecord] = {}
    expected: int | None = 0
    for name, shape, kind, offset in records:
        if name in placed:
            raise _DamageError(f"tensor {name!r} is listed twice")
        label, block, bytes_of_block = types.get(kind, (f"number {kind}", 0, 0))
        if block and math.prod(shape) and shape and shape[-1] % block:
            raise _DamageError(f"tensor {name!r} has rows of {shape[-1]}, no multiple of the {block} of {label}")
        if offset % alignment or (expected is not None and offset != expected):
            due = "a multiple of the alignment" if expected is None else str(expected)
            raise _DamageError(f"tensor {name!r} lies at {offset} of the data, expected {due}")
        # Of a type that the package does not know, not even the size is known, nor where the next tensor begins.
        nbytes = math.prod(shape) // block * bytes_of_block if block else 0
        if base + offset + nbytes > file.size:
            raise CheckpointError(
                f"{file.path}: truncated: tensor {name!r} ends at byte {base + offset + nbytes} but the file has "
                f"{file.size}; download or copy it again"
            )
        expected = _padded(offset + nbytes, alignment) if block else None
        placed[name] = TensorRecord(file=file, offset=base + offset, nbytes=nbytes, shape=shape, type=label)
    return placed


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
