"""Read 4-bit floats (E2M1) with scales for 16 or 32 inputs: MXFP4 and NVFP4.

- Stacked experts of gpt-oss: `*_blocks` uint8 [experts, out, groups, 16] and `*_scales` uint8 [experts, out, groups].
  The weight is [experts, in, out], as transformers has it in the live model.
- compressed-tensors `nvfp4-pack-quantized`: `weight_packed` uint8 [out, in / 2], `weight_scale` fp8 [out, in / 16],
  `weight_global_scale`: w = code * scale / global scale.
- ModelOpt's NVFP4: `weight` uint8 [out, in / 2], `weight_scale` fp8 [out, in / 16], `weight_scale_2`:
  w = code * scale * scale_2.
- MXFP4 under the same names, with exponents for scales and none for the whole (compressed-tensors
  `mxfp4-pack-quantized`); in int8 for the experts of DeepSeek-V4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.quantized.base import (
    FLOATS,
    POWERS,
    QuantizedTensor,
    Stored,
    UnconvertibleError,
    expect,
    logical,
    shown,
)
from esdtool.checkpoint.quantized.bits import scale_values, unpack_float4
from esdtool.checkpoint.quantized.roundoff import microscaling_roundoff, nvfp4_roundoff
from esdtool.checkpoint.quantized.scaled import find_scale

if TYPE_CHECKING:
    import torch

_BLOCKS = "_blocks"
_BYTES_OF_BLOCK = 16
_FP8 = frozenset({"float8_e4m3fn"})


@dataclass(frozen=True, kw_only=True)
class Float4Tensor(QuantizedTensor):
    """A weight w = code * scale, multiplied or divided by a scale of the whole tensor."""

    scale: str
    """Name of the scales, [..., groups]: one for each group of inputs."""
    group: int
    """Number of inputs that share a scale: 16 or 32."""
    whole: str | None = None
    """Name of the scale of the whole tensor."""
    divide: bool = False
    """Whether to divide by the scale of the whole tensor."""
    transposed: bool = False
    """Whether the weight's last two dimensions are exchanged."""

    def read_rows(self, source: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Read rows or experts; nothing else is read from any part."""
        codes = source.read_rows(self.codes, start, stop)
        scales = scale_values(source.read_rows(self.scale, start, stop))
        if self.whole is not None:
            whole = scale_values(source.read(self.whole)).flatten()
            scales = scales / whole if self.divide else scales * whole
        groups = unpack_float4(codes.reshape(*scales.shape, self.group // 2))
        weight = groups.mul_(scales.unsqueeze(-1)).flatten(-2)
        return weight.transpose(-1, -2).contiguous() if self.transposed else weight


def find_float4(codes: TensorInfo, stored: Stored) -> QuantizedTensor | None:
    """Recognise a weight in 4-bit floats, or return None.

    Raises:
        UnconvertibleError: if a part is missing or does not fit.
    """
    if codes.name.endswith(_BLOCKS) and codes.dtype == "uint8":
        return _blocks(codes, stored)
    module, _, leaf = codes.name.rpartition(".")
    prefix = f"{module}." if module else ""
    if leaf == "weight_packed" and codes.dtype == "uint8":
        scale = stored.need(prefix + "weight_scale")
        whole = stored.find(prefix + "weight_global_scale")
        if scale.dtype not in POWERS and whole is None:
            raise UnconvertibleError("'weight_global_scale' is not there")
        return _pairs(codes, scale, whole, name=prefix + "weight", divide=True)
    if leaf == "weight" and codes.dtype == "uint8":
        return _modelopt(codes, stored, prefix)
    if codes.dtype == "int8" and len(codes.shape) >= 2:
        exponents = find_scale(codes, stored, ("scale",))
        if exponents is not None and exponents.dtype in POWERS:
            return _pairs(codes, exponents, None, name=codes.name, divide=False)
    return None


def _modelopt(codes: TensorInfo, stored: Stored, prefix: str) -> QuantizedTensor | None:
    scale = stored.find(prefix + "weight_scale")
    whole = stored.find(prefix + "weight_scale_2")
    if scale is None or (whole is None and scale.dtype not in POWERS):
        return None
    if stored.find(prefix + "pre_quant_scale") is not None:
        raise UnconvertibleError("its inputs have scales of their own ('pre_quant_scale')")
    return _pairs(codes, scale, whole, name=codes.name, divide=False)


def _blocks(codes: TensorInfo, stored: Stored) -> QuantizedTensor:
    name = codes.name.removesuffix(_BLOCKS)
    if len(codes.shape) not in (3, 4) or codes.shape[-1] != _BYTES_OF_BLOCK or 0 in codes.shape:
        raise UnconvertibleError(f"blocks have shape {shown(codes.shape)}, expected [..., out, groups, 16]")
    scale = stored.need(f"{name}_scales")
    expect(scale, codes.shape[:-1], POWERS)
    *experts, rows, groups, _ = codes.shape
    columns = groups * _BYTES_OF_BLOCK * 2
    return Float4Tensor(
        info=logical(
            codes,
            name=name,
            shape=(*experts, columns, rows) if experts else (rows, columns),
            quantization="mxfp4",
            roundoff=microscaling_roundoff("float4_e2m1", 32),
        ),
        codes=codes.name,
        scale=scale.name,
        group=2 * _BYTES_OF_BLOCK,
        transposed=bool(experts),
    )


def _pairs(
    codes: TensorInfo, scale: TensorInfo, whole: TensorInfo | None, *, name: str, divide: bool
) -> QuantizedTensor:
    """Build a weight from codes [..., out, in / 2]."""
    group, dtypes = (32, POWERS) if whole is None else (16, _FP8)
    *leading, width = codes.shape
    if len(codes.shape) not in (2, 3) or width * 2 % group or 0 in codes.shape:
        raise UnconvertibleError(
            f"codes have shape {shown(codes.shape)}, expected [..., in / 2] with groups of {group}"
        )
    expect(scale, (*leading, width * 2 // group), dtypes)
    if whole is not None:
        if whole.numel != 1:
            raise UnconvertibleError(f"scale of the whole has shape {shown(whole.shape)}, expected one number")
        expect(whole, whole.shape, FLOATS)
    return Float4Tensor(
        info=logical(
            codes,
            name=name,
            shape=(*leading, width * 2),
            quantization="mxfp4" if whole is None else "nvfp4",
            roundoff=microscaling_roundoff("float4_e2m1", 32) if whole is None else nvfp4_roundoff(group),
        ),
        codes=codes.name,
        scale=scale.name,
        group=group,
        whole=None if whole is None else whole.name,
        divide=divide,
    )
