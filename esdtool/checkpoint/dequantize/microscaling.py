"""Four-bit floats (E2M1) with shared scales: MXFP4 (OCP Microscaling Formats) and NVFP4."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from esdtool.checkpoint.dequantize.bits import FP4_VALUES, nibbles
from esdtool.checkpoint.dequantize.source import Rows, Source, Weight

_ROUNDOFF = 0.6 / 4
"""Unit roundoff of one explicit mantissa bit is 1/4."""


def find(source: Source) -> Iterator[Weight]:
    """Pairs `X_blocks`, `X_scales` (gpt-oss), and `X.weight_packed` with FP8 and global scales (compressed-tensors)."""
    for stem in source.ending("_blocks"):
        blocks, scales = source.shape(f"{stem}_blocks"), source.shape(f"{stem}_scales")
        if blocks is None or len(blocks) < 3 or blocks[-1] != 16 or scales != blocks[:-1]:
            source.refuse(f"{stem}_blocks", f"no {stem}_scales of a fitting shape beside it")
            continue
        matrix = (*blocks[:-2], blocks[-2] * 32)
        # A stack [experts, out, in] is held the other way round by the live model.
        shape = (matrix[0], matrix[2], matrix[1]) if len(matrix) == 3 else matrix
        yield Weight(
            name=stem if len(matrix) == 3 else f"{stem}.weight",
            codes=f"{stem}_blocks",
            shape=shape,
            quantization="mxfp4",
            roundoff=_ROUNDOFF,
            read=partial(_read_mxfp4, source, stem),
        )
    for stem in source.ending("weight_packed"):
        packed, scale = source.tensors[f"{stem}weight_packed"], source.tensors.get(f"{stem}weight_scale")
        if packed.dtype != "uint8" or len(packed.shape) != 2:
            continue
        rows, columns = packed.shape[0], packed.shape[1] * 2
        fits = scale is not None and scale.dtype.startswith("float8") and scale.shape == (rows, columns // 16)
        if not fits or f"{stem}weight_global_scale" not in source.tensors:
            source.refuse(packed.name, "its weight_scale and weight_global_scale are missing or do not fit")
            continue
        yield Weight(
            name=f"{stem}weight",
            codes=packed.name,
            shape=(rows, columns),
            quantization="nvfp4",
            roundoff=_ROUNDOFF,
            read=partial(_read_nvfp4, source, stem),
        )


def _read_mxfp4(source: Source, stem: str, rows: Rows) -> torch.Tensor:
    """Codes times 2^(scale - 127), groups of 32, the low nibble first."""
    checkpoint = source.checkpoint
    blocks, scales = f"{stem}_blocks", f"{stem}_scales"
    if rows is None:
        codes, exponents = checkpoint.read(blocks), checkpoint.read(scales)
    else:
        codes, exponents = checkpoint.read_rows(blocks, *rows), checkpoint.read_rows(scales, *rows)
    values = _fp4(codes)
    values = torch.ldexp(values, exponents.to(torch.int32).unsqueeze(-1) - 127).flatten(-2)
    return values.mT.contiguous() if values.ndim == 3 else values


def _read_nvfp4(source: Source, stem: str, rows: Rows) -> torch.Tensor:
    """Codes times an FP8 scale for each 16, over the scale of the tensor; the low nibble first."""
    checkpoint = source.checkpoint
    start, stop = rows or (0, source.tensors[f"{stem}weight_packed"].shape[0])
    values = _fp4(checkpoint.read_rows(f"{stem}weight_packed", start, stop))
    scale = checkpoint.read_rows(f"{stem}weight_scale", start, stop).to(torch.float32)
    scale = scale / checkpoint.read(f"{stem}weight_global_scale").to(torch.float32)
    return values * scale.repeat_interleave(16, dim=1)


def _fp4(packed: torch.Tensor) -> torch.Tensor:
    return torch.tensor(FP4_VALUES, dtype=torch.float32)[nibbles(packed, low_first=True)]
