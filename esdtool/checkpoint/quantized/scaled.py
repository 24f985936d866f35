"""Read codes that are numbers themselves and are multiplied by scales: the variants of fp8 and int8.

- fp8 with a scale for each block, `weight_scale_inv` (DeepSeek-V3, arXiv 2412.19437; despite its name it is
  multiplied), for each row or for the whole (`weight_scale`: compressed-tensors `float-quantized`, FBGEMM, ModelOpt;
  `scale_weight`), or for each 32 inputs with bytes as exponents (MXFP8).
- int8 with `SCB` of bitsandbytes: the largest absolute value of each row, which the code 127 stands for (LLM.int8(),
  Dettmers et al. 2022, arXiv 2208.07339).
- int8 with `weight_scale`, and `weight_zero_point` where the range is not symmetric (compressed-tensors
  `int-quantized`): w = (code - zero) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.quantized.base import (
    FLOAT8,
    POWERS,
    QuantizedTensor,
    Stored,
    UnconvertibleError,
    expect,
    logical,
    shown,
)
from esdtool.checkpoint.quantized.bits import scale_values
from esdtool.checkpoint.quantized.roundoff import float_roundoff, integer_roundoff, microscaling_roundoff
from esdtool.checkpoint.quantized.scales import WEIGHT_SCALES, ScaleGrid, fit_scales
from esdtool.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_FLOAT8_SCALES = ("scale", "qscale_weight")
"""Further names of the scales of fp8 weights, used by DeepSeek and Mistral. For integers `scale` is ambiguous."""

_CODES = ".qweight"

_STACK_SCALES = ("_scale_inv", "_weight_scale_inv", "_scale", "_weight_scale")
"""Suffixes of the scales of stacked experts, whose parameters are not called `weight`."""


@dataclass(frozen=True, kw_only=True)
class ScaledTensor(QuantizedTensor):
    """A weight w = (code - zero) * scale * factor, in float32."""

    scale: TensorInfo
    grid: ScaleGrid
    zero: str | None = None
    """Name of the zero points, one for each scale."""
    factor: float = 1.0
    layout: str | None = None
    """Name of a scalar of bitsandbytes that must be 0: the codes are in the order of rows and columns."""

    def read_rows(self, source: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Read rows or experts; for stacked experts, only their own scales are read."""
        import torch

        if self.layout is not None and source.read(self.layout).flatten()[0].item() != 0:
            raise CheckpointError(
                f"{source.location}: tensor {self.codes!r}: its columns are permuted ({self.layout!r} is not 0); "
                "load and save the model with a current bitsandbytes"
            )
        weight = source.read_rows(self.codes, start, stop).to(torch.float32)
        if self.zero is not None:
            weight -= self._spread(source, self.zero, start, stop).to(torch.float32)
        scales = scale_values(self._spread(source, self.scale.name, start, stop))
        return weight.mul_(scales * self.factor if self.factor != 1 else scales)

    def _spread(self, source: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
        stacked = len(self.grid.shape) > 2 and self.grid.shape[0] > 1
        if not stacked:
            return self.grid.spread(source.read(name), self.info.shape, start, stop)
        own = ScaleGrid(shape=(stop - start, *self.grid.shape[1:]), block=self.grid.block)
        return own.spread(source.read_rows(name, start, stop), self.info.shape, 0, stop - start)


def find_float8(codes: TensorInfo, stored: Stored) -> QuantizedTensor | None:
    """Recognise an fp8 weight with scales, or return None, also for fp8 weights without scales.

    Raises:
        UnconvertibleError: if the scales do not fit.
    """
    if codes.dtype not in FLOAT8 or len(codes.shape) < 2:
        return None
    scale = find_scale(codes, stored, _FLOAT8_SCALES)
    if scale is None:
        return None
    stacked = len(codes.shape) == 3 and not codes.name.endswith("weight")
    grid = fit_scales(
        codes.shape, scale.shape, stored.settings.blocks, last_axis=stacked and stored.settings.method == "fbgemm_fp8"
    )
    roundoff = microscaling_roundoff if scale.dtype in POWERS else float_roundoff
    return ScaledTensor(
        info=logical(
            codes,
            shape=codes.shape,
            quantization=f"{codes.dtype}{_described(grid, codes.shape)}",
            roundoff=roundoff(codes.dtype, grid.group),
        ),
        codes=codes.name,
        scale=scale,
        grid=grid,
        zero=_zero(codes, scale, stored),
    )


def find_int8(codes: TensorInfo, stored: Stored) -> QuantizedTensor | None:
    """Recognise an int8 weight with scales, or return None.

    Raises:
        UnconvertibleError: if there are no scales, or they do not fit, or the order of the codes is unknown.
    """
    if codes.dtype != "int8" or len(codes.shape) < 2:
        return None
    if codes.name.endswith(_CODES):
        return _codes_and_scale(codes, stored)
    if not _is_weight(codes.name):
        return None
    absmax = stored.find(_base(codes.name) + "SCB")
    if absmax is not None:
        return _bitsandbytes(codes, absmax, stored)
    scale = find_scale(codes, stored)
    if scale is None:
        raise UnconvertibleError(f"no scale is there ({stored.settings.named})")
    if scale.name.endswith("weight_scales") or stored.settings.method == "eetq":
        raise UnconvertibleError("EETQ permutes its codes for one kind of GPU")
    if len(codes.shape) != 2:
        raise UnconvertibleError(f"int8 codes {shown(codes.shape)} of unknown layout")
    if scale.dtype in POWERS:
        raise UnconvertibleError(f"int8 codes with scales of dtype {scale.dtype}")
    groups = tuple((1, size) for size in stored.settings.group_sizes)
    grid = fit_scales(codes.shape, scale.shape, (*stored.settings.blocks, *groups))
    return ScaledTensor(
        info=logical(codes, shape=codes.shape, quantization="int8", roundoff=integer_roundoff(8, grid.group)),
        codes=codes.name,
        scale=scale,
        grid=grid,
        zero=_zero(codes, scale, stored),
    )


def _codes_and_scale(codes: TensorInfo, stored: Stored) -> QuantizedTensor | None:
    """Recognise `X.qweight`, one code per byte, with `X.scale` of its rows, as small tools write a tensor `X`."""
    name = codes.name.removesuffix(_CODES)
    scale = stored.find(f"{name}.scale")
    if scale is None:
        return None
    grid = fit_scales(codes.shape, scale.shape)
    return ScaledTensor(
        info=logical(
            codes, shape=codes.shape, quantization="int8", roundoff=integer_roundoff(8, grid.group), name=name
        ),
        codes=codes.name,
        scale=scale,
        grid=grid,
    )


def find_scale(codes: TensorInfo, stored: Stored, further: tuple[str, ...] = ()) -> TensorInfo | None:
    """Find the scales of a weight, or of stacked experts, by the usual names."""
    if _is_weight(codes.name):
        return stored.first(*(_base(codes.name) + suffix for suffix in (*WEIGHT_SCALES, *further)))
    return stored.first(*(codes.name + suffix for suffix in _STACK_SCALES))


def _bitsandbytes(codes: TensorInfo, absmax: TensorInfo, stored: Stored) -> QuantizedTensor:
    if len(codes.shape) != 2:
        raise UnconvertibleError(f"int8 codes {shown(codes.shape)} of unknown layout")
    expect(absmax, (codes.shape[0],))
    layout = stored.find(_base(codes.name) + "weight_format")
    return ScaledTensor(
        info=logical(codes, shape=codes.shape, quantization="int8", roundoff=integer_roundoff(8, codes.shape[1])),
        codes=codes.name,
        scale=absmax,
        grid=fit_scales(codes.shape, absmax.shape),
        factor=1 / 127,
        layout=None if layout is None else layout.name,
    )


def _zero(codes: TensorInfo, scale: TensorInfo, stored: Stored) -> str | None:
    """Find the name of the zero points, which have the shape of the scales."""
    zero = stored.find(_base(codes.name) + "weight_zero_point")
    if zero is None:
        return None
    expect(zero, scale.shape)
    return zero.name


def _described(grid: ScaleGrid, shape: tuple[int, ...]) -> str:
    if all(count == 1 for count in grid.shape[-2:]):
        return ""
    rows, columns = grid.block[-2:]
    if columns == shape[-1] and rows == 1:
        return ", scales of rows"
    if rows == shape[-2] and columns == 1:
        return ", scales of columns"
    return f", {rows}x{columns} scales"


def _is_weight(name: str) -> bool:
    return name.rpartition(".")[2] == "weight"


def _base(name: str) -> str:
    return name.removesuffix("weight")
