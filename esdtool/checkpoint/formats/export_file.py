"""The weights in an archive of `torch.export.save` (`.pt2`). Its program is neither read nor run.

The archive is a zip file. `data/weights/model_weights_config.json` says where each tensor lies and how; the tensors'
bytes are members of their own, stored without compression, so that they can be read by offset.
"""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from esdtool.checkpoint.base import TensorInfo
from esdtool.errors import CheckpointError
from esdtool.support.words import one_line

CONFIG = "data/weights/model_weights_config.json"
_DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    10: "complex64",
    11: "complex128",
    12: "bool",
    13: "bfloat16",
    28: "uint16",
    29: "float8_e4m3fn",
    30: "float8_e5m2",
    31: "float8_e4m3fnuz",
    32: "float8_e5m2fnuz",
    33: "float8_e8m0fnu",
    34: "uint32",
    35: "uint64",
}
"""By the number of `torch._export.serde.schema.ScalarType`."""
_STRIDED = 7
_CONFIG_LIMIT = 100_000_000
_LOCAL_HEADER = 30
"""Bytes of a member's own header before its name."""


class _Size(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    as_int: NonNegativeInt


class _Meta(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    dtype: int
    sizes: list[_Size]
    strides: list[_Size]
    storage_offset: _Size
    layout: int = _STRIDED


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    path_name: str
    use_pickle: bool = False
    tensor_meta: _Meta | None = None


class _Config(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    config: dict[str, _Entry]


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a tensor's elements are."""

    offset: int
    nbytes: int
    strides: tuple[int, ...]
    start: int


def is_export_archive(path: Path) -> bool:
    """Whether a file is a zip archive with the weights of an exported program."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2] == CONFIG for name in archive.namelist())
    # Whatever is wrong with it, the reader of torch.save's files says so.
    except Exception:
        return False


class ExportFile:
    """An exported program's weights, known by their configuration."""

    def __init__(self, path: Path, label: str) -> None:
        """Read the configuration of `path`; `label` is its name within the checkpoint.

        Raises:
            CheckpointError: if the archive or its configuration is damaged.
        """
        self._path = path
        self._places: dict[str, _Place] = {}
        self.tensors: dict[str, TensorInfo] = {}
        pickled: list[str] = []
        try:
            with zipfile.ZipFile(path) as archive:
                config_name = next(name for name in archive.namelist() if name.partition("/")[2] == CONFIG)
                if archive.getinfo(config_name).file_size > _CONFIG_LIMIT:
                    raise CheckpointError(f"{path}: its list of weights has more than {_CONFIG_LIMIT} bytes")
                config = _Config.model_validate(json.loads(archive.read(config_name)))
                folder = config_name.rpartition("/")[0]
                for name, entry in config.config.items():
                    if entry.use_pickle or entry.tensor_meta is None or entry.tensor_meta.layout != _STRIDED:
                        pickled.append(name)
                        continue
                    member = archive.getinfo(f"{folder}/{entry.path_name}")
                    self._add(name, entry.tensor_meta, member, label)
        except CheckpointError:
            raise
        # The archive is arbitrary bytes: damaged directories, missing members, JSON of any shape.
        except Exception as error:
            raise CheckpointError(
                f"{path}: damaged torch.export archive: {_first_line(error)}; download or copy it again"
            ) from error
        notes = [f"{path}: a torch.export archive: its weights are read, its program is not"]
        if pickled:
            notes.append(f"{path}: left out {len(pickled)} tensors that are pickled or sparse: {pickled[0]}")
        self.notes: tuple[str, ...] = tuple(notes)

    def _add(self, name: str, meta: _Meta, member: zipfile.ZipInfo, label: str) -> None:
        dtype = _DTYPES.get(meta.dtype)
        if dtype is None:
            raise ValueError(f"tensor {name!r} has the unknown type {meta.dtype}")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"tensor {name!r} is compressed")
        shape = tuple(size.as_int for size in meta.sizes)
        strides = tuple(stride.as_int for stride in meta.strides)
        start, size = meta.storage_offset.as_int, getattr(torch, dtype).itemsize
        if len(shape) != len(strides):
            raise ValueError(f"tensor {name!r} has {len(shape)} sizes and {len(strides)} strides")
        last = start + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and (last + 1) * size > member.file_size:
            raise ValueError(f"tensor {name!r} ends beyond its {member.file_size} bytes")
        if math.prod(shape) * size > member.file_size:
            raise ValueError(f"tensor {name!r} has more elements than are stored")
        self._places[name] = _Place(
            offset=self._data_offset(member), nbytes=member.file_size, strides=strides, start=start
        )
        self.tensors[name] = TensorInfo(name=name, shape=shape, dtype=dtype, file=label)

    def _data_offset(self, member: zipfile.ZipInfo) -> int:
        """Offset of a member's data: behind its local header, whose length the directory does not tell."""
        with self._path.open("rb") as file:
            file.seek(member.header_offset)
            header = file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise ValueError(f"no member at byte {member.header_offset}")
        lengths = np.frombuffer(header, dtype="<u2", count=2, offset=26)
        offset = member.header_offset + _LOCAL_HEADER + int(lengths.sum())
        if offset + member.file_size > self._path.stat().st_size:
            raise ValueError(f"member {member.filename!r} ends beyond the file")
        return offset

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read one tensor, or some positions of its first dimension."""
        info, place = self.tensors[name], self._places[name]
        try:
            raw = np.fromfile(self._path, dtype=np.uint8, count=place.nbytes, offset=place.offset)
        except OSError as error:
            raise CheckpointError(f"{self._path}: tensor {name!r}: cannot read: {one_line(error)}") from error
        dtype: torch.dtype = getattr(torch, info.dtype)
        if raw.size != place.nbytes:
            raise CheckpointError(f"{self._path}: tensor {name!r}: cannot read: the file has become shorter")
        flat = torch.from_numpy(raw[: raw.size // dtype.itemsize * dtype.itemsize]).view(dtype)
        tensor = flat.as_strided(info.shape, place.strides, place.start) if info.numel else flat.new_empty(info.shape)
        return tensor if rows is None else tensor[rows]


def _first_line(error: Any) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return one_line(error)
