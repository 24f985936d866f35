"""What bitsandbytes writes: LLM.int8() (Dettmers et al. 2022), NF4 and FP4 (QLoRA, Dettmers et al. 2023)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from esdtool.checkpoint.dequantize.bits import nibbles
from esdtool.checkpoint.dequantize.source import Rows, Source, Weight, absmax_roundoff
from esdtool.errors import CheckpointError

_ROUNDOFF = {"nf4": 0.09, "fp4": 0.13}
"""Measured on normally distributed weights in blocks of 64."""


def find(source: Source) -> Iterator[Weight]:
    """int8 matrices with `SCB` beside them, and packed ones with a `quant_state`."""
    for stem in source.ending("SCB"):
        name, rows = f"{stem}weight", source.shape(f"{stem}SCB")
        shape = source.shape(name)
        if shape is None or source.tensors[name].dtype != "int8" or rows != shape[:1]:
            source.refuse(f"{stem}SCB", f"no int8 matrix {name} that fits it")
            continue
        yield Weight(
            name=name,
            codes=name,
            shape=shape,
            quantization="int8",
            roundoff=absmax_roundoff(127, 4.0),
            read=partial(_read_int8, source, stem),
        )
    for kind in ("nf4", "fp4"):
        for name in source.ending(f".quant_state.bitsandbytes__{kind}"):
            try:
                state = _state(source, name, kind)
            except (KeyError, TypeError, ValueError) as error:
                source.refuse(name, f"its quant_state is damaged or incomplete ({error})")
                continue
            yield Weight(
                name=name,
                codes=name,
                shape=tuple(state["shape"]),
                quantization=kind,
                roundoff=_ROUNDOFF[kind],
                read=partial(_read_4bit, source, name, state),
            )


def _read_int8(source: Source, stem: str, rows: Rows) -> torch.Tensor:
    """Codes times the largest absolute weight of their row over 127."""
    start, stop = rows or (0, source.tensors[f"{stem}SCB"].shape[0])
    codes = source.checkpoint.read_rows(f"{stem}weight", start, stop).to(torch.float32)
    largest = source.checkpoint.read(f"{stem}SCB")[start:stop].to(torch.float32)
    return codes * (largest / 127).unsqueeze(1)


def _state(source: Source, name: str, kind: str) -> Mapping[str, Any]:
    """The JSON that bitsandbytes packs into a tensor of bytes, checked against the codes."""
    blob = source.checkpoint.read(f"{name}.quant_state.bitsandbytes__{kind}")
    state: dict[str, Any] = json.loads(bytes(blob.to(torch.uint8).flatten().tolist()))
    shape, blocksize = [int(size) for size in state["shape"]], int(state["blocksize"])
    needed = [f"{name}.absmax", f"{name}.quant_map"]
    if "nested_blocksize" in state:
        needed += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    missing = [tensor for tensor in (name, *needed) if tensor not in source.tensors]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    numel = math.prod(shape)
    if source.tensors[name].numel != -(-numel // 2) or source.tensors[needed[0]].numel != -(-numel // blocksize):
        raise ValueError(f"the codes do not fit the shape {shape}")
    return state | {"shape": shape, "blocksize": blocksize}


def _read_4bit(source: Source, name: str, state: Mapping[str, Any], rows: Rows) -> torch.Tensor:
    """A table of 16 values times the largest absolute weight of each block; the high nibble first."""
    read = source.checkpoint.read
    shape = state["shape"]
    packed = read(name)
    if packed.dtype != torch.uint8:  # some trainers store the bytes under a wider type
        packed = packed.view(torch.uint8)
    codes = nibbles(packed.flatten(), low_first=False)[: math.prod(shape)]
    if int(codes.max()) > 15:
        raise CheckpointError(f"{source.checkpoint.location}: tensor {name!r}: codes beyond 4 bits")
    absmax = read(f"{name}.absmax")
    if "nested_blocksize" in state:
        table = read(f"{name}.nested_quant_map").to(torch.float32)
        outer = read(f"{name}.nested_absmax").to(torch.float32)
        scale = outer.repeat_interleave(int(state["nested_blocksize"]))[: absmax.numel()]
        absmax = table[absmax.flatten().to(torch.int64)] * scale + float(state["nested_offset"])
    blocks = absmax.to(torch.float32).flatten().repeat_interleave(state["blocksize"])[: codes.numel()]
    weight = (read(f"{name}.quant_map").to(torch.float32)[codes] * blocks).reshape(shape)
    return weight if rows is None else weight[slice(*rows)]
