"""One `.safetensors` file. Format: 8 bytes of header length (little endian), a JSON header, then the data."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from esdtool.checkpoint.base import TensorInfo
from esdtool.checkpoint.heads import read_head
from esdtool.errors import CheckpointError
from esdtool.support.words import one_line

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
    "F4": "float4_e2m1fn",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
_HEADER_LIMIT = 100_000_000
"""Bytes; the format's own limit."""


_HANDLE_BYTES = 32 * 2**20
"""What may be read through one handle, which keeps the pages that were read in memory."""


class SafetensorsFile:
    """A `.safetensors` file, known by its header."""

    def __init__(self, path: Path, label: str) -> None:
        """Read the header of `path`; `label` is its name within the checkpoint."""
        self._path = path
        self._handle: Any = None
        self._bytes_read = 0
        self._lock = threading.Lock()
        self.notes: tuple[str, ...] = ()
        self.tensors: dict[str, TensorInfo] = {}
        read_head(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                    header = file.get_slice(name)
                    dtype = header.get_dtype()
                    self.tensors[name] = TensorInfo(
                        name=name,
                        shape=tuple(header.get_shape()),
                        dtype=_DTYPES.get(dtype, dtype.lower()),
                        file=label,
                    )
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {_diagnosis(path, error)}") from error

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read one tensor, or some rows of it. Several threads may read at a time."""
        try:
            file = self._open()
            tensor: torch.Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
            self._count(tensor.nbytes)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._path}: tensor {name!r}: cannot read: {one_line(error)}") from error
        return tensor

    def _open(self) -> Any:
        """A handle, the last one if little was read through it: opening parses the names of all tensors."""
        with self._lock:
            if self._handle is None:
                self._handle = safe_open(self._path, framework="pt")
            return self._handle

    def _count(self, size: int) -> None:
        """Let go of a handle through which enough was read; whoever still reads with it keeps it until then."""
        with self._lock:
            self._bytes_read += size
            if self._bytes_read >= _HANDLE_BYTES:
                self._handle, self._bytes_read = None, 0


def _diagnosis(path: Path, error: Exception) -> str:
    """What is wrong with a file that the library does not open, in the user's terms."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            return f"truncated: {size} bytes are too few for a safetensors header; download or copy it again"
        if length > _HEADER_LIMIT:
            return f"not a safetensors file: it claims a header of {length} bytes (limit {_HEADER_LIMIT})"
        if 8 + length > size:
            return f"truncated: its header takes {8 + length} bytes but the file has {size}; download or copy it again"
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as bad:
        return f"not a safetensors file: its header is not UTF-8 text at byte {8 + bad.start}"
    except (json.JSONDecodeError, RecursionError):
        return "not a safetensors file: its header is not valid JSON"
    needed = 8 + length + _last_offset(header)
    if needed > size:
        return f"truncated: its header promises {needed} bytes but the file has {size}; download or copy it again"
    if needed < size:
        return f"damaged: the file has {size} bytes but its header describes {needed}; download or copy it again"
    return f"damaged header: {one_line(error).removeprefix('Error while deserializing header: ')}"


def _last_offset(header: Any) -> int:
    """Largest end offset in a header of which nothing is known."""
    entries = header.values() if isinstance(header, dict) else ()
    offsets = [entry.get("data_offsets") for entry in entries if isinstance(entry, dict)]
    ends = [pair[1] for pair in offsets if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int)]
    return max(ends, default=0)
