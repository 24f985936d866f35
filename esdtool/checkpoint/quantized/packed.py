"""Read the format `pack-quantized` of compressed-tensors: integers of 2, 4 or 8 bits, packed into words.

`weight_packed` int32 [out, in * bits / 32] stores codes plus 2^(bits - 1), the first in the lowest bits. Its companions
are `weight_scale`, a scalar, [out, 1] or [out, groups]; `weight_shape` [2]; for asymmetric ranges `weight_zero_point`,
packed along the outputs [out * bits / 32, groups]; and `weight_g_idx` [in] if the inputs of a group are not
consecutive. The weight is (code - zero) * scale. Codes of 3 bits and other odd widths are not read, because
compressed-tensors packs them in two ways, depending on its version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.quantized.base import (
    FLOATS,
    WORDS,
    QuantizedTensor,
    Stored,
    UnconvertibleError,
    expect,
    logical,
    shown,
)
from esdtool.checkpoint.quantized.bits import WORD, packed_length, unpack_words
from esdtool.checkpoint.quantized.roundoff import integer_roundoff
from esdtool.checkpoint.quantized.scales import ScaleGrid, fit_scales
from esdtool.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_BITS = (2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class PackedTensor(QuantizedTensor):
    """A weight w = (code - zero) * scale, in float32."""

    bits: int
    scale: str
    grid: ScaleGrid
    zero: str | None
    shape: str | None
    """Name of the stored shape, which is checked against the shape in the catalogue."""
    groups: str | None
    """Name of the tensor with the group of each input."""

    def read_rows(self, source: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Read only the requested rows of the codes."""
        import torch

        self._check_shape(source)
        outputs, inputs = self.info.shape
        words = source.read_rows(self.codes, start, stop)
        weight = unpack_words(words, self.bits)[:, :inputs].to(torch.float32)
        # Both code and zero are stored plus 2^(bits - 1): it cancels.
        if self.zero is None:
            weight -= 2 ** (self.bits - 1)
        else:
            zeros = unpack_words(source.read(self.zero).T.contiguous(), self.bits).T[:outputs]
            weight -= self._spread(source, zeros, start, stop).to(torch.float32)
        scales = self._spread(source, source.read(self.scale).to(torch.float32), start, stop)
        return weight.mul_(scales)

    def _spread(self, source: Checkpoint, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Expand scales or zero points so that they broadcast over the weights."""
        if self.groups is not None:
            group = source.read(self.groups).long()
            if int(group.min()) >= 0:  # -1: not in use
                if int(group.max()) >= values.shape[1]:
                    raise CheckpointError(
                        f"{source.location}: tensor {self.groups!r}: group {int(group.max())}, but there are "
                        f"{values.shape[1]}; download or copy the checkpoint again"
                    )
                return values[start:stop, group]
        return self.grid.spread(values, self.info.shape, start, stop)

    def _check_shape(self, source: Checkpoint) -> None:
        if self.shape is None:
            return
        shape = tuple(source.read(self.shape).flatten().tolist())
        if shape != self.info.shape:
            raise CheckpointError(
                f"{source.location}: tensor {self.codes!r}: {self.shape!r} says {shown(shape)}, but codes and scales "
                f"are those of {shown(self.info.shape)}; download or copy the checkpoint again"
            )


def find_packed(codes: TensorInfo, stored: Stored) -> QuantizedTensor | None:
    """Recognise a weight in packed integers, or return None.

    `weight_shape` is read only if the shapes of codes and scales do not determine that of the weight.

    Raises:
        UnconvertibleError: if a part is missing or does not fit, or the number of bits is unknown.
    """
    module, _, leaf = codes.name.rpartition(".")
    if leaf != "weight_packed" or codes.dtype == "uint8":
        return None
    prefix = f"{module}." if module else ""
    expect(codes, codes.shape, WORDS)
    scale = stored.need(prefix + "weight_scale")
    expect(scale, scale.shape, FLOATS)
    if len(codes.shape) != 2 or 0 in codes.shape:
        raise UnconvertibleError(f"codes have shape {shown(codes.shape)}, expected [out, in * bits / 32]")
    stored_shape = stored.find(prefix + "weight_shape")
    bits, inputs = _bits_and_inputs(codes, scale, stored_shape, stored)
    shape = (codes.shape[0], inputs)
    grid = fit_scales(shape, scale.shape, tuple((1, size) for size in stored.settings.group_sizes))
    zero = stored.find(prefix + "weight_zero_point")
    if zero is not None:
        if len(scale.shape) != 2:
            raise UnconvertibleError(f"zero points with scales {shown(scale.shape)}")
        expect(zero, (packed_length(scale.shape[0], bits), scale.shape[1]), WORDS)
    groups = stored.find(prefix + "weight_g_idx")
    if groups is not None:
        expect(groups, (inputs,))
    return PackedTensor(
        info=logical(
            codes,
            name=prefix + "weight",
            shape=shape,
            quantization=f"int{bits}",
            roundoff=integer_roundoff(bits, grid.group),
        ),
        codes=codes.name,
        bits=bits,
        scale=scale.name,
        grid=grid,
        zero=None if zero is None else zero.name,
        shape=None if stored_shape is None else stored_shape.name,
        groups=None if groups is None or len(scale.shape) != 2 or scale.shape[1] == 1 else groups.name,
    )


def _bits_and_inputs(codes: TensorInfo, scale: TensorInfo, shape: TensorInfo | None, stored: Stored) -> tuple[int, int]:
    """Return the bits of a code and the number of inputs, reading `weight_shape` only if nothing else tells.

    A model may have tens of thousands of such tensors.
    """
    rows, words = codes.shape
    declared = stored.settings.bits
    if len(declared) == 1 and len(scale.shape) == 2 and scale.shape[1] > 1:
        (bits,) = declared
        for size in stored.settings.group_sizes:
            if bits in _BITS and packed_length(scale.shape[1] * size, bits) == words:
                return bits, scale.shape[1] * size
    if shape is None:
        raise UnconvertibleError("'weight_shape' is not there")
    if shape.numel != 2:
        raise UnconvertibleError(f"'weight_shape' has shape {shown(shape.shape)}, expected [2]")
    sizes = stored.source.read(shape.name).flatten().tolist()
    if len(sizes) != 2 or sizes[0] != rows or sizes[1] <= 0:
        raise UnconvertibleError(f"'weight_shape' {sizes} does not fit codes {shown(codes.shape)}")
    inputs = int(sizes[1])
    fitting = [bits for bits in declared or _BITS if packed_length(inputs, bits) == words]
    if len(fitting) != 1 or fitting[0] not in _BITS:
        named = " or ".join(map(str, sorted(declared))) or "unknown"
        raise UnconvertibleError(
            f"{inputs} inputs in {words} words of {WORD} bits: codes of {named} bits (known 2, 4, 8)"
        )
    return fitting[0], inputs
