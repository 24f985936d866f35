"""The weights in an archive of `torch.export.save` (`.pt2`). Its program is neither read nor run.

The archive is a zip file. `data/weights/model_weights_config.json` says where each tensor lies and how; the bytes of
the tensors are members of their own.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from esdtool.checkpoint.base import DTYPE_BYTES, TensorInfo
from esdtool.checkpoint.container import WeightFile
from esdtool.checkpoint.limits import JSON_BYTES, check_expansion
from esdtool.checkpoint.raw_bytes import elements
from esdtool.checkpoint.stored_file import StoredFile
from esdtool.checkpoint.zip_member import ZipMember, zip_members
from esdtool.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_CONFIG = "data/weights/model_weights_config.json"
_ZIP_MAGIC = b"PK\x03\x04"
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
    """The member with a tensor's elements, and how they lie in it."""

    member: ZipMember
    strides: tuple[int, ...]
    start: int


def is_exported(file: StoredFile) -> bool:
    """Return whether a file is an archive with the weights of an exported program."""
    return file.head.startswith(_ZIP_MAGIC) and any(name.partition("/")[2] == _CONFIG for name in zip_members(file))


class ExportedFile(WeightFile):
    """An exported program's weights, known by their configuration."""

    def __init__(self, file: StoredFile, label: str) -> None:
        """Read the configuration of a file; `label` is its name within the checkpoint.

        Raises:
            CheckpointError: if the archive or its configuration is damaged.
        """
        self._file = file
        members = zip_members(file)
        name = next(name for name in members if name.partition("/")[2] == _CONFIG)
        folder = name.rpartition("/")[0]
        try:
            config = _Config.model_validate(json.loads(members[name].read_all(JSON_BYTES)))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise self._damaged(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except (ValueError, RecursionError) as error:
            raise self._damaged("its list of weights is not valid JSON") from error
        self._places: dict[str, _Place] = {}
        tensors: dict[str, TensorInfo] = {}
        pickled: list[str] = []
        for tensor, entry in config.config.items():
            if entry.use_pickle or entry.tensor_meta is None or entry.tensor_meta.layout != _STRIDED:
                pickled.append(tensor)
                continue
            member = members.get(f"{folder}/{entry.path_name}")
            if member is None:
                raise self._damaged(f"tensor {tensor!r} is not in it")
            tensors[tensor] = self._entry(tensor, entry.tensor_meta, member, label)
        self.tensors = tensors
        notes = [f"{file.path}: a torch.export archive: its weights are read, its program is not"]
        if pickled:
            notes.append(f"{file.path}: left out {len(pickled)} tensors that are pickled or sparse: {pickled[0]}")
        self.notes = tuple(notes)

    def _entry(self, name: str, meta: _Meta, member: ZipMember, label: str) -> TensorInfo:
        dtype = _DTYPES.get(meta.dtype)
        if dtype is None:
            raise self._damaged(f"tensor {name!r} is of the unknown type {meta.dtype}")
        shape = tuple(size.as_int for size in meta.sizes)
        strides = tuple(stride.as_int for stride in meta.strides)
        start, width = meta.storage_offset.as_int, DTYPE_BYTES[dtype]
        if len(shape) != len(strides):
            raise self._damaged(f"tensor {name!r} has {len(shape)} sizes and {len(strides)} strides")
        last = start + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and (last + 1) * width > member.size:
            raise self._damaged(f"tensor {name!r} ends beyond its {member.size} bytes")
        check_expansion(f"{self._file.path}: tensor {name!r}", math.prod(shape) * width, member.size)
        self._places[name] = _Place(member=member, strides=strides, start=start)
        return TensorInfo(name=name, shape=shape, dtype=dtype, file=label)

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._file.path}: damaged torch.export archive: {why}; download or copy it again")

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read one tensor, or some positions of its first dimension."""
        info, place = self.tensors[name], self._places[name]
        width = DTYPE_BYTES[info.dtype]
        flat = elements(place.member.read(0, place.member.size // width * width), info.dtype)
        tensor = flat.as_strided(info.shape, place.strides, place.start) if info.numel else flat.new_empty(info.shape)
        return tensor if rows is None else tensor[rows]
