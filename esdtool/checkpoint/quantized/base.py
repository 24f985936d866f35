"""What the formats have in common: one weight in several stored tensors, and the search for its parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.quantized.settings import Settings, read_settings
from esdtool.names import canonical_name

if TYPE_CHECKING:
    import torch

FLOAT8 = frozenset({"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"})
INTEGERS = frozenset({"int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"})
FLOATS = frozenset({"float32", "bfloat16", "float16", "float64"})
"""Dtypes of scales that are numbers."""
WORDS = frozenset({"int32"})
"""Dtype of packed codes."""
POWERS = frozenset({"uint8", "float8_e8m0fnu"})
"""Dtypes of scales that are powers of two, stored as their exponents."""


class UnconvertibleError(Exception):
    """Codes of which it cannot be told what weights they stand for. The message says why; it names no remedy."""


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor(ABC):
    """A weight that is stored as codes and their companions."""

    info: TensorInfo
    """The weight's entry in the catalogue: logical name and shape, float32."""
    codes: str
    """Name of the stored tensor in whose place it is listed."""

    @abstractmethod
    def read_rows(self, source: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Positions `start` to `stop` of the weight's first dimension, float32; 0 <= start <= stop <= shape[0].

        Raises:
            CheckpointError: if the data cannot be read, or contradicts the catalogue.
        """


class Stored:
    """A checkpoint as it is stored, and the search for a tensor's companions."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.source = checkpoint
        self.settings: Settings = read_settings(checkpoint.config)

    def find(self, name: str) -> TensorInfo | None:
        """The tensor of that name, wherever wrappers have put their segments."""
        tensors = self.source.tensors
        return tensors.get(name) or self._by_canonical_name.get(canonical_name(name))

    def first(self, *names: str) -> TensorInfo | None:
        """The first of several that is there."""
        return next((info for name in names if (info := self.find(name)) is not None), None)

    def need(self, name: str) -> TensorInfo:
        """The same for a companion without which nothing can be done."""
        info = self.find(name)
        if info is None:
            raise UnconvertibleError(f"{name.rpartition('.')[2]!r} is not there")
        return info

    @cached_property
    def _by_canonical_name(self) -> dict[str, TensorInfo]:
        return {canonical_name(name): info for name, info in self.source.tensors.items()}


def logical(
    codes: TensorInfo, *, shape: tuple[int, ...], quantization: str, roundoff: float, name: str | None = None
) -> TensorInfo:
    """Catalogue entry of a weight that is stored as `codes`."""
    return TensorInfo(
        name=codes.name if name is None else name,
        shape=shape,
        dtype="float32",
        file=codes.file,
        quantization=quantization,
        roundoff=roundoff,
    )


def shown(shape: tuple[int, ...]) -> str:
    """A shape for a message.

    >>> shown((2, 3))
    '[2, 3]'
    """
    return str(list(shape))


def expect(info: TensorInfo, shape: tuple[int, ...], dtypes: frozenset[str] | None = None) -> None:
    """Check a companion's shape, and its dtype where one is prescribed.

    Raises:
        UnconvertibleError: if it does not fit.
    """
    leaf = info.name.rpartition(".")[2]
    if info.shape != shape:
        raise UnconvertibleError(f"{leaf!r} has shape {shown(info.shape)}, expected {shown(shape)}")
    if dtypes is not None and info.dtype not in dtypes:
        raise UnconvertibleError(f"{leaf!r} has dtype {info.dtype}, expected {' or '.join(sorted(dtypes))}")
