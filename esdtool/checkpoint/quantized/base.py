"""Share code between the formats: one weight is stored in several tensors, and its parts must be found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.quantized.settings import QuantizationSettings, read_settings
from esdtool.names import canonical_name

if TYPE_CHECKING:
    import torch

FLOAT8 = frozenset({"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"})
INTEGERS = frozenset({"int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"})
FLOATS = frozenset({"float32", "bfloat16", "float16", "float64"})
"""Dtypes of scales that are stored as numbers."""
WORDS = frozenset({"int32"})
"""Dtype of packed codes."""
POWERS = frozenset({"uint8", "float8_e8m0fnu"})
"""Dtypes of scales that are powers of two, stored as their exponents."""


class UnconvertibleError(Exception):
    """The weights that some codes represent cannot be determined. The message says why, but names no remedy."""


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor(ABC):
    """A weight that is stored as codes, with companions such as scales."""

    info: TensorInfo
    """Entry of the weight in the catalogue: logical name and shape, dtype float32."""
    codes: str
    """Name of the stored tensor that the weight replaces in the catalogue."""

    @abstractmethod
    def read_rows(self, source: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Read the positions `start` to `stop` of the first dimension, in float32; 0 <= start <= stop <= shape[0].

        Raises:
            CheckpointError: if the data cannot be read, or contradicts the catalogue.
        """


class Stored:
    """A checkpoint as it is stored; finds the companions of a tensor."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.source = checkpoint
        self.settings: QuantizationSettings = read_settings(checkpoint.config)

    def find(self, name: str) -> TensorInfo | None:
        """Find a tensor by name, ignoring the segments that wrappers insert."""
        tensors = self.source.tensors
        return tensors.get(name) or self._by_canonical_name.get(canonical_name(name))

    def first(self, *names: str) -> TensorInfo | None:
        """Find the first of several names that exists."""
        return next((info for name in names if (info := self.find(name)) is not None), None)

    def need(self, name: str) -> TensorInfo:
        """Find a companion that is required.

        Raises:
            UnconvertibleError: if it does not exist.
        """
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
    """Build the catalogue entry of a weight that is stored as `codes`."""
    return TensorInfo(
        name=codes.name if name is None else name,
        shape=shape,
        dtype="float32",
        file=codes.file,
        quantization=quantization,
        roundoff=roundoff,
    )


def shown(shape: tuple[int, ...]) -> str:
    """Format a shape for a message.

    >>> shown((2, 3))
    '[2, 3]'
    """
    return str(list(shape))


def expect(info: TensorInfo, shape: tuple[int, ...], dtypes: frozenset[str] | None = None) -> None:
    """Check the shape of a companion, and its dtype if `dtypes` prescribes one.

    Raises:
        UnconvertibleError: if it does not fit.
    """
    leaf = info.name.rpartition(".")[2]
    if info.shape != shape:
        raise UnconvertibleError(f"{leaf!r} has shape {shown(info.shape)}, expected {shown(shape)}")
    if dtypes is not None and info.dtype not in dtypes:
        raise UnconvertibleError(f"{leaf!r} has dtype {info.dtype}, expected {' or '.join(sorted(dtypes))}")
