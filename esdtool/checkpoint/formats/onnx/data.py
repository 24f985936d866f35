"""The elements of an ONNX tensor: inside the model's file, or beside it in external data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from esdtool.checkpoint.jsonfiles import leaves_folder
from esdtool.checkpoint.limits import check_shapes, shortened
from esdtool.checkpoint.stored_file import StoredFile, exists
from esdtool.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

TYPES: dict[int, tuple[str, int]] = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    14: ("complex64", 64),
    15: ("complex128", 128),
    16: ("bfloat16", 16),
    17: ("float8_e4m3fn", 8),
    18: ("float8_e4m3fnuz", 8),
    19: ("float8_e5m2", 8),
    20: ("float8_e5m2fnuz", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
}
"""Name in torch and bits of an element, by `TensorProto.DataType`."""

_BIT_PATTERNS = {
    "bfloat16": np.int16,
    "float8_e4m3fn": np.uint8,
    "float8_e4m3fnuz": np.uint8,
    "float8_e5m2": np.uint8,
    "float8_e5m2fnuz": np.uint8,
}
"""What numpy views elements as of which it has no type of its own."""

_EXTERNAL = 1
"""`data_location` of a tensor outside of the file."""
_LONGEST_NUMBER = 20


@dataclass(frozen=True, kw_only=True)
class OnnxData:
    """The place of the elements of one tensor."""

    shape: tuple[int, ...]
    type: int
    """Number of the data type."""
    inline: Any = field(default=None, repr=False)
    """The `TensorProto` that holds them."""
    file: StoredFile | None = field(default=None, repr=False)
    """The stretch of another file that holds them."""
    location: str | None = None
    """Path of that file, relative to the model's folder."""

    @property
    def dtype(self) -> str:
        """torch's name of the type; `int4` and `uint4` besides."""
        return TYPES[self.type][0]

    def whole(self) -> torch.Tensor:
        """Return all elements; codes of 4 bits take a byte each."""
        from onnx import numpy_helper

        if self.file is None:
            return _as_tensor(numpy_helper.to_array(self.inline), self.dtype)
        return self._decoded(self.file.read(0, self.file.size), self.shape)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Positions `start` to `stop` of the first dimension. Only their bytes are read, where they are whole bytes."""
        bits = TYPES[self.type][1] * math.prod(self.shape[1:])
        if self.file is None or not self.shape or bits % 8:
            return self.whole()[start:stop] if self.shape else self.whole()
        each = bits // 8
        raw = self.file.read(start * each, (stop - start) * each)
        return self._decoded(raw, (stop - start, *self.shape[1:]))

    def _decoded(self, raw: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> torch.Tensor:
        """Elements from their bytes. `onnx` would copy them several times; it unpacks those of 4 bits."""
        from onnx import TensorProto, numpy_helper

        if TYPES[self.type][1] < 8:
            proto = TensorProto(data_type=self.type, dims=shape, raw_data=raw.tobytes())
            return _as_tensor(numpy_helper.to_array(proto), self.dtype)
        stored = np.dtype(_BIT_PATTERNS.get(self.dtype, self.dtype)).newbyteorder("<")
        return _as_tensor(raw.view(stored).reshape(shape), self.dtype)


def _as_tensor(array: Array, dtype: str) -> torch.Tensor:
    """Return an array of a type of ONNX in torch."""
    import torch

    if dtype in ("int4", "uint4"):
        return torch.from_numpy(array.astype(np.int8 if dtype == "int4" else np.uint8))
    if dtype in _BIT_PATTERNS:
        bits = np.ascontiguousarray(array).view(_BIT_PATTERNS[dtype]).reshape(array.shape)
        return torch.from_numpy(_owned(bits)).view(getattr(torch, dtype))
    return torch.from_numpy(_owned(array.astype(array.dtype.newbyteorder("="), copy=False)))


def _owned(array: Array) -> Array:
    """Return the array itself if it may be written to; torch warns of others."""
    return array if array.flags.writeable else array.copy()


def data_of(model: StoredFile, name: str, proto: Any) -> OnnxData:
    """Find the elements of a `TensorProto`.

    Raises:
        CheckpointError: if there are not as many as its shape says, or they are in no file of the model's folder.
    """
    shape = tuple(proto.dims)
    check_shapes(f"{model.path}: tensor {shortened(name)!r}", [shape])
    nbytes = -(-math.prod(shape) * TYPES[proto.data_type][1] // 8)
    if proto.data_location == _EXTERNAL:
        location, file = _external(model, name, proto, nbytes)
        return OnnxData(shape=shape, type=proto.data_type, file=file, location=location)
    held = _inline_bytes(proto)
    if held != nbytes:
        raise CheckpointError(f"{model.path}: tensor {name!r}: damaged: {held} bytes of data, not {nbytes}")
    return OnnxData(shape=shape, type=proto.data_type, inline=proto)


def _external(model: StoredFile, name: str, proto: Any, nbytes: int) -> tuple[str, StoredFile]:
    """(location, stretch of the file there) of a tensor outside of the model's file."""
    entries = {entry.key: entry.value for entry in proto.external_data}
    location, offset = entries.get("location", ""), entries.get("offset", "0")
    length = entries.get("length", str(nbytes))
    if not location or leaves_folder(location):
        raise CheckpointError(
            f"{model.path}: tensor {name!r}: refused: its data in {location!r} lies outside the model's folder"
        )
    if not _is_number(offset) or not _is_number(length) or int(length) < nbytes:
        raise CheckpointError(
            f"{model.path}: tensor {name!r}: damaged: offset {shortened(offset)!r}, length {shortened(length)!r} "
            "of its data"
        )
    path = model.path.parent / location
    if not exists(path):
        raise CheckpointError(f"{model.path}: its external data {location} is missing; copy it beside the model")
    file = StoredFile.at(path)
    if int(offset) + nbytes > file.size:
        raise CheckpointError(
            f"{path}: truncated: tensor {name!r} ends at byte {int(offset) + nbytes} but the file has {file.size}; "
            "download or copy it again"
        )
    return location, file.part(int(offset), nbytes)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _LONGEST_NUMBER


def _inline_bytes(proto: Any) -> int:
    """Return the bytes that the elements inside the file take: raw, or in the typed fields of older exporters."""
    if proto.HasField("raw_data"):
        return len(proto.raw_data)
    bits = TYPES[proto.data_type][1]
    for values, width in ((proto.float_data, 32), (proto.double_data, 64), (proto.int64_data, 64)):
        if len(values):  # of complex numbers real and imaginary parts in turn
            return len(values) * width // 8
    # Everything of 32 bits and less in a number each, but two codes of 4 bits in one.
    return (len(proto.uint64_data) + len(proto.int32_data)) * max(bits, 8) // 8
