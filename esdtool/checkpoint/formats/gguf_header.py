"""The header of a GGUF file: its metadata and where its tensors lie, without the tokenizer's long lists."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esdtool.checkpoint.heads import read_head
from esdtool.errors import CheckpointError
from esdtool.support.words import one_line

_MAGIC = b"GGUF"

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata value types by number, as `struct` spells them."""

_STRING = 8

_ARRAY = 9

_LONGEST_LIST = 4096
"""Arrays of numbers up to this length are read (sizes layer by layer); others, the vocabulary's above all, are not."""

_MOST_DIMENSIONS = 4


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where and how one tensor is stored."""

    path: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    """Dimensions as stored, slowest first."""
    type: str
    """ggml's name of the type, e.g. `Q4_K`."""


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What a file says of itself."""

    metadata: Mapping[str, Any]
    stored: Mapping[str, Stored]


class _Cursor:
    """Reads forwards through a mapped header."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self.data):
            raise EOFError

    def numbers(self, letters: str) -> tuple[Any, ...]:
        layout = "<" + letters
        start = self.position
        self.skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self.data, start)

    def text(self) -> str:
        (length,) = self.numbers("Q")
        start = self.position
        self.skip(length)
        return self.data[start : self.position].decode("utf-8")

    def value(self, kind: int) -> Any:
        """A value of the metadata; None for an array that is passed over."""
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"metadata of unknown type {kind}")
        item, length = self.numbers("IQ")
        if item in _SCALARS:
            if length <= _LONGEST_LIST:
                return list(self.numbers(f"{length}{_SCALARS[item]}"))
            self.skip(length * struct.calcsize("<" + _SCALARS[item]))
        elif item == _STRING:
            for _ in range(length):
                self.skip(self.numbers("Q")[0])
        else:
            for _ in range(length):
                self.value(item)
        return None


def read_header(path: Path, types: Mapping[int, tuple[str, int, int]]) -> _Header:
    """The header of one file.

    Args:
        path: the file.
        types: name, elements and bytes of a block, by ggml's number of the type.

    Raises:
        CheckpointError: if it is truncated, damaged, or of a version that is not read.
    """
    head = read_head(path)
    if not head.startswith(_MAGIC):
        raise CheckpointError(f"{path}: not a GGUF file: it does not begin with {_MAGIC.decode()!r}")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, _Cursor(data), types)
    except EOFError as error:
        raise CheckpointError(f"{path}: truncated within its header; download or copy it again") from error
    except (OSError, ValueError, OverflowError, MemoryError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path}: damaged GGUF header: {one_line(error)}; download or copy it again") from error


def _parse(path: Path, cursor: _Cursor, types: Mapping[int, tuple[str, int, int]]) -> _Header:
    cursor.skip(len(_MAGIC))
    (version,) = cursor.numbers("I")
    if version not in (2, 3):
        why = "big-endian" if version & 0xFFFF == 0 else f"GGUF version {version}"
        raise CheckpointError(f"{path}: {why}, which is not read; convert the model again with llama.cpp")
    count, pairs = cursor.numbers("QQ")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.numbers("I")[0])
    records: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(count):
        name = cursor.text()
        (dimensions,) = cursor.numbers("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = cursor.numbers(f"{dimensions}Q")[::-1]
        records.append((name, shape, *cursor.numbers("IQ")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"alignment {alignment!r}")
    base = -(-cursor.position // alignment) * alignment
    size = len(cursor.data)
    stored: dict[str, Stored] = {}
    for name, shape, kind, offset in records:
        if name in stored:
            raise ValueError(f"tensor {name!r} is listed twice")
        label, block, bytes_of_block = types.get(kind, (f"number {kind}", 0, 0))
        if block and math.prod(shape) and shape and shape[-1] % block:
            raise ValueError(f"tensor {name!r} has rows of {shape[-1]}, no multiple of the {block} of {label}")
        # Of a type that the package does not know, not even the size is known.
        nbytes = math.prod(shape) // block * bytes_of_block if block else 0
        if base + offset + nbytes > size:
            raise CheckpointError(
                f"{path}: truncated: tensor {name!r} ends at byte {base + offset + nbytes} but the file has {size}; "
                "download or copy it again"
            )
        stored[name] = Stored(path=path, offset=base + offset, nbytes=nbytes, shape=shape, type=label)
    return _Header(metadata=metadata, stored=stored)
