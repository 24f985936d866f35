"""Integers packed into 32-bit words: GPTQ, AWQ, and the `pack-quantized` format of compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from esdtool.checkpoint.dequantize.bits import fields, fields_of_words
from esdtool.checkpoint.dequantize.source import Rows, Source, Weight, absmax_roundoff

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position within a word of column 0, 1, 2, ...: AWQ stores them as its kernel wants them."""


def find(source: Source) -> Iterator[Weight]:
    """`X.qweight` with zeros and scales, and `X.weight_packed` with scales."""
    for stem in source.ending("qweight"):
        if source.tensors[f"{stem}qweight"].dtype != "int32":
            continue  # one code a byte
        found = _gptq(source, stem) or _awq(source, stem)
        if found is None:
            source.refuse(
                f"{stem}qweight", "with its qzeros and scales it is neither GPTQ of 2, 3, 4 or 8 bits nor AWQ of 4"
            )
        else:
            yield found
    for stem in source.ending("weight_packed"):
        if source.tensors[f"{stem}weight_packed"].dtype == "int32":
            found = _compressed(source, stem)
            if found is not None:
                yield found


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """Sizes of a GPTQ or AWQ matrix."""

    rows: int
    """in."""
    columns: int
    """out."""
    bits: int
    groups: int


def _shapes(source: Source, stem: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    codes, zeros, scales = (source.shape(f"{stem}{leaf}") for leaf in ("qweight", "qzeros", "scales"))
    if codes is None or zeros is None or scales is None or {len(codes), len(zeros), len(scales)} != {2}:
        return None
    return codes, zeros, scales


def _gptq(source: Source, stem: str) -> Weight | None:
    """GPTQ: words run down the input side, [in * bits / 32, out]."""
    shapes = _shapes(source, stem)
    if shapes is None:
        return None
    codes, zeros, scales = shapes
    bits = 32 * zeros[1] // scales[1] if scales[1] else 0
    if codes[1] != scales[1] or bits not in (2, 3, 4, 8) or zeros != (scales[0], scales[1] * bits // 32):
        return None
    if source.method == "awq" or int(source.settings.get("bits", bits)) != bits:
        return None
    index = source.shape(f"{stem}g_idx")
    rows = codes[0] * 32 // bits if index is None else index[0]
    if codes[0] != rows * bits // 32:
        return None
    grid = _Grid(rows=rows, columns=codes[1], bits=bits, groups=scales[0])
    return Weight(
        name=f"{stem}weight",
        codes=f"{stem}qweight",
        shape=(grid.columns, grid.rows),
        quantization=f"gptq {bits}-bit",
        roundoff=absmax_roundoff(2 ** (bits - 1)),
        read=partial(_read_gptq, source, stem, grid),
    )


def _read_gptq(source: Source, stem: str, grid: _Grid, rows: Rows) -> torch.Tensor:
    """(code - zero) scale; zeros are stored less 1, except by version 2 of the format."""
    read = source.checkpoint.read
    codes = fields(read(f"{stem}qweight"), grid.bits, 0, grid.rows)
    zeros = fields(read(f"{stem}qzeros"), grid.bits, 1, grid.columns)
    if source.settings.get("checkpoint_format") != "gptq_v2":
        zeros = zeros + 1
    if f"{stem}g_idx" in source.tensors:
        group = read(f"{stem}g_idx").to(torch.int64)
    else:
        group = torch.arange(grid.rows) // -(-grid.rows // grid.groups)
    scales = read(f"{stem}scales").to(torch.float32)
    weight: torch.Tensor = (codes - zeros[group]).to(torch.float32) * scales[group]
    return _some(weight.T.contiguous(), rows)


def _awq(source: Source, stem: str) -> Weight | None:
    """AWQ, version `gemm`: words run along the output side, [in, out / 8]."""
    shapes = _shapes(source, stem)
    if shapes is None or str(source.settings.get("version", "gemm")).lower() != "gemm":
        return None
    codes, zeros, scales = shapes
    if codes[1] * 8 != scales[1] or zeros != (scales[0], codes[1]) or codes[0] % scales[0]:
        return None
    grid = _Grid(rows=codes[0], columns=scales[1], bits=4, groups=scales[0])
    return Weight(
        name=f"{stem}weight",
        codes=f"{stem}qweight",
        shape=(grid.columns, grid.rows),
        quantization="awq 4-bit",
        roundoff=absmax_roundoff(8),
        read=partial(_read_awq, source, stem, grid),
    )


def _read_awq(source: Source, stem: str, grid: _Grid, rows: Rows) -> torch.Tensor:
    """(code - zero) scale."""
    read = source.checkpoint.read

    def unpacked(name: str) -> torch.Tensor:
        codes: torch.Tensor = fields(read(f"{stem}{name}"), 4, 1).unflatten(1, (-1, 8))
        return codes[:, :, list(_AWQ_ORDER)].flatten(1)

    size = grid.rows // grid.groups
    zeros = unpacked("qzeros").repeat_interleave(size, dim=0)
    scales = read(f"{stem}scales").to(torch.float32).repeat_interleave(size, dim=0)
    return _some(((unpacked("qweight") - zeros).to(torch.float32) * scales).T.contiguous(), rows)


def _compressed(source: Source, stem: str) -> Weight | None:
    """compressed-tensors: words run along the input side, [out, in / (32 // bits)]; codes are offset by half."""
    name = f"{stem}weight_packed"
    packed, scales = source.shape(name), source.shape(f"{stem}weight_scale")
    if packed is None or scales is None or f"{stem}weight_shape" not in source.tensors or len(packed) != 2:
        source.refuse(name, f"{stem}weight_scale or {stem}weight_shape is missing")
        return None
    rows, columns = (int(size) for size in source.checkpoint.read(f"{stem}weight_shape").flatten().tolist())
    bits = next((bits for bits in (2, 4, 8) if packed == (rows, -(-columns // (32 // bits)))), None)
    groups = scales[1] if len(scales) > 1 else 1
    if bits is None or scales[0] not in (1, rows) or columns % groups:
        source.refuse(name, f"its shape {list(packed)} and scales {list(scales)} do not fit {rows} x {columns}")
        return None
    return Weight(
        name=f"{stem}weight",
        codes=name,
        shape=(rows, columns),
        quantization=f"packed {bits}-bit",
        roundoff=absmax_roundoff(2 ** (bits - 1), 3.0 if groups > 1 else 4.0),
        read=partial(_read_compressed, source, stem, (rows, columns), bits),
    )


def _read_compressed(source: Source, stem: str, shape: tuple[int, int], bits: int, rows: Rows) -> torch.Tensor:
    """(code - zero) scale, codes and zeros less 2^(bits - 1)."""
    read = source.checkpoint.read
    start, stop = rows or (0, shape[0])
    half = 2 ** (bits - 1)
    packed = source.checkpoint.read_rows(f"{stem}weight_packed", start, stop)
    codes = fields_of_words(packed, bits, 1, shape[1]) - half
    scales = read(f"{stem}weight_scale").to(torch.float32)
    scales = scales.reshape(scales.shape[0], -1).expand(shape[0], -1)[start:stop]
    groups = scales.shape[1]
    if f"{stem}weight_g_idx" in source.tensors:
        group = read(f"{stem}weight_g_idx").to(torch.int64).clamp(min=0)
    else:
        group = torch.arange(shape[1]) // (shape[1] // groups)
    if f"{stem}weight_zero_point" in source.tensors:
        zeros = read(f"{stem}weight_zero_point")
        if zeros.dtype == torch.int32 and zeros.shape[0] != shape[0]:
            zeros = fields_of_words(zeros, bits, 0, shape[0]) - half
        codes = codes - zeros.to(torch.int64).reshape(zeros.shape[0], -1).expand(shape[0], -1)[start:stop][:, group]
    weight: torch.Tensor = codes.to(torch.float32) * scales[:, group]
    return weight


def _some(weight: torch.Tensor, rows: Rows) -> torch.Tensor:
    return weight if rows is None else weight[slice(*rows)]
