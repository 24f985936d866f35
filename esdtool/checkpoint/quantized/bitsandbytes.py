"""Read the 4-bit weights of bitsandbytes, `nf4` and `fp4` (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

`weight` holds two codes per byte, the first in the high bits, in the order of the weight. It is usually uint8 [n, 1];
with `bnb_4bit_quant_storage` the bytes have another dtype. Its companions are `weight.quant_map` (the meaning of each
code), `weight.absmax` (the largest absolute value of each block), and `weight.quant_state.bitsandbytes__nf4`, the
bytes of a JSON object with the shape and the size of a block. With double quantisation `absmax` itself holds codes:
absmax = nested_quant_map[code] * nested_absmax[block of blocks] + nested_offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esdtool.checkpoint.base import DTYPE_BYTES, Checkpoint, TensorInfo
from esdtool.checkpoint.limits import shortened
from esdtool.checkpoint.quantized.base import QuantizedTensor, Stored, UnconvertibleError, expect, logical
from esdtool.checkpoint.quantized.roundoff import bnb_fp4_roundoff, nf4_roundoff

if TYPE_CHECKING:
    import torch

_ROUNDOFF = {"nf4": nf4_roundoff, "fp4": bnb_fp4_roundoff}
_UINT8 = frozenset({"uint8"})
_LONGEST_STATE = 2**16
"""Bytes of the JSON object; bitsandbytes writes a hundred."""
_LARGEST_OFFSET = 1e30
_STORAGE = frozenset({"uint8", "int8", "float16", "bfloat16", "float32", "float64"})


@dataclass(frozen=True, kw_only=True)
class Nested:
    """The second quantisation of double quantisation: how the codes in `absmax` become numbers."""

    absmax: str
    meanings: str
    block: int
    offset: float


@dataclass(frozen=True, kw_only=True)
class NormalFloatTensor(QuantizedTensor):
    """A weight w = quant_map[code] * absmax[block], in float32."""

    absmax: str
    meanings: str
    """Name of the meanings of the codes, [16] float32."""
    block: int
    """Number of weights that share an `absmax`."""
    nested: Nested | None

    def read_rows(self, source: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Read the whole weight, because blocks do not end at the ends of rows."""
        import torch

        packed = source.read(self.codes).contiguous().flatten().view(torch.uint8)
        meanings = source.read(self.meanings).to(torch.float32)
        absmax = source.read(self.absmax)
        if self.nested is not None:
            absmax = self._absmax(source, absmax, self.nested)
        # Whole bytes that hold the rows asked for; the first may begin within the row before.
        width = math.prod(self.info.shape[1:])
        first, last = start * width, stop * width
        begin = first // 2
        pairs = torch.stack([meanings.repeat_interleave(16), meanings.repeat(16)], dim=-1)  # of each byte
        values = pairs[packed[begin : (last + 1) // 2].int()].flatten()[first - 2 * begin :][: last - first]
        if values.numel():
            lowest = first // self.block
            scales = absmax[lowest : (last - 1) // self.block + 1].to(torch.float32).repeat_interleave(self.block)
            values *= scales[first - lowest * self.block :][: last - first]
        return values.reshape(stop - start, *self.info.shape[1:])

    @staticmethod
    def _absmax(source: Checkpoint, codes: torch.Tensor, nested: Nested) -> torch.Tensor:
        import torch

        scales = source.read(nested.absmax).to(torch.float32).repeat_interleave(nested.block)[: codes.numel()]
        return source.read(nested.meanings).to(torch.float32)[codes.int()] * scales + nested.offset


def find_normal_float(codes: TensorInfo, stored: Stored) -> QuantizedTensor | None:
    """Recognise a 4-bit weight of bitsandbytes, or return None.

    This reads the small JSON object, because nothing else contains the shape.

    Raises:
        UnconvertibleError: if a part is missing or does not fit.
    """
    if codes.name.rpartition(".")[2] != "weight" or codes.dtype not in _STORAGE:
        return None
    states = {kind: stored.find(f"{codes.name}.quant_state.bitsandbytes__{kind}") for kind in _ROUNDOFF}
    kind, state = next(((kind, info) for kind, info in states.items() if info is not None), ("", None))
    if state is None:
        if stored.find(f"{codes.name}.absmax") is None:
            return None
        raise UnconvertibleError("'weight.quant_state.bitsandbytes__*' is not there")
    expect(state, state.shape, _UINT8)
    if state.numel > _LONGEST_STATE:
        raise UnconvertibleError(f"its quant_state has {state.numel} bytes")
    facts = _facts(stored.source.read(state.name).flatten().tolist())
    shape = _shape(facts)
    count = math.prod(shape)
    block = min(_size(facts, "blocksize"), count)
    width = DTYPE_BYTES[codes.dtype]
    if not 0 <= 2 * width * codes.numel - count < 2 * width:
        raise UnconvertibleError(f"{width * codes.numel} bytes do not hold the {count} weights of {list(shape)}")
    absmax, meanings = stored.need(f"{codes.name}.absmax"), stored.need(f"{codes.name}.quant_map")
    blocks = -(-count // block)
    expect(meanings, (16,))
    nested = None
    if "nested_offset" in facts:
        expect(absmax, (blocks,), _UINT8)
        nested = _nested(facts, blocks, codes, stored)
    else:
        expect(absmax, (blocks,), frozenset({"float32", "float16", "bfloat16"}))
    return NormalFloatTensor(
        info=logical(codes, shape=shape, quantization=kind, roundoff=_ROUNDOFF[kind](block)),
        codes=codes.name,
        absmax=absmax.name,
        meanings=meanings.name,
        block=block,
        nested=nested,
    )


def _nested(facts: Mapping[str, Any], blocks: int, codes: TensorInfo, stored: Stored) -> Nested:
    size, offset = min(_size(facts, "nested_blocksize"), blocks), facts["nested_offset"]
    if type(offset) not in (float, int) or not -_LARGEST_OFFSET < offset < _LARGEST_OFFSET:
        raise UnconvertibleError(f"its quant_state has nested_offset {shortened(repr(offset))}")
    absmax, meanings = stored.need(f"{codes.name}.nested_absmax"), stored.need(f"{codes.name}.nested_quant_map")
    expect(absmax, (-(-blocks // size),))
    expect(meanings, (256,))
    return Nested(absmax=absmax.name, meanings=meanings.name, block=size, offset=float(offset))


def _facts(data: list[int]) -> Mapping[str, Any]:
    try:
        facts = json.loads(bytes(data).decode())
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise UnconvertibleError("its quant_state is not a JSON object")
    return facts


def _shape(facts: Mapping[str, Any]) -> tuple[int, ...]:
    shape = facts.get("shape")
    if not isinstance(shape, list) or len(shape) < 2 or not all(type(size) is int and size > 0 for size in shape):
        raise UnconvertibleError(f"its quant_state has shape {shortened(repr(shape))}")
    return tuple(shape)


def _size(facts: Mapping[str, Any], key: str) -> int:
    size = facts.get(key)
    if type(size) is not int or size <= 0:
        raise UnconvertibleError(f"its quant_state has {key} {shortened(repr(size))}")
    return size
