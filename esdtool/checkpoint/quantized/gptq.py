"""Read GPTQ and AWQ: integers packed into `qweight`, with `scales` and packed `qzeros` for groups of inputs.

GPTQ (Frantar et al. 2022, arXiv 2210.17323; files of AutoGPTQ and GPTQModel): `qweight` int32
[in * bits / 32, out], `qzeros` int32 [groups, out * bits / 32], `scales` [groups, out], `g_idx` [in], the group of each
input. w[o, i] = scales[g, o] * (code - zero[g, o]) with g = g_idx[i]. Files of the format `gptq` store zero - 1, those
of `gptq_v2` the zero itself.

AWQ (Lin et al. 2023, arXiv 2306.00978; AutoAWQ's GEMM layout): `qweight` int32 [in, out / 8], `qzeros` int32
[groups, out / 8], `scales` [groups, out], 4 bits. Within a word the outputs have the order 0 2 4 6 1 3 5 7.

The shapes determine the format of a file and the number of bits of a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.quantized.base import (
    WORDS,
    QuantizedTensor,
    Stored,
    UnconvertibleError,
    expect,
    logical,
    shown,
)
from esdtool.checkpoint.quantized.bits import WORD, unpack_words
from esdtool.checkpoint.quantized.roundoff import integer_roundoff
from esdtool.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_INTEGERS = frozenset({"int32", "int64"})
_GPTQ_BITS = (2, 3, 4, 8)
_AWQ_BITS = 4
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Positions of the outputs 0, 1, ... in a word."""

_ZERO_STORED_LESS_ONE = {
    None: True,  # the name of the format came with version 2
    "gptq": True,
    "gptq_v2": False,
    "auto_gptq": True,
    "auto_round:gptq": True,
    "auto_round:auto_gptq": True,
}
_AWQ_LAYOUTS = frozenset({None, "gemm", "auto_awq", "auto_round:awq", "auto_round:auto_awq"})


@dataclass(frozen=True, kw_only=True)
class GptqTensor(QuantizedTensor):
    """A GPTQ weight w = scale * (code - zero), with scale and zero of the group of the input, in float32."""

    bits: int
    scales: str
    zeros: str
    groups: str | None
    """Name of the group of each input. None means groups of `group_size` consecutive inputs."""
    group_size: int
    less_one: bool
    """Whether zeros are stored minus one."""

    def read_rows(self, source: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Read the whole weight, because outputs are the last dimension of the stored codes."""
        import torch

        inputs = self.info.shape[1]
        words = source.read(self.codes)[:, start:stop].T.contiguous()
        weight = unpack_words(words, self.bits).to(torch.float32)
        zeros = self._zeros(source.read(self.zeros))[:, start:stop].T
        scales = source.read(self.scales)[:, start:stop].T.to(torch.float32)
        group = self._group_of_each_input(source, scales.shape[1], inputs).to(words.device)
        weight -= zeros[:, group]
        return weight.mul_(scales[:, group])

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        """Unpack the zero points: [groups, out] float32."""
        import torch

        codes = unpack_words(words, self.bits).to(torch.float32)
        # Writers let a zero of 0 wrap to the largest code.
        if self.less_one:
            codes = torch.remainder(codes + 1, 2**self.bits)
        return codes

    def _group_of_each_input(self, source: Checkpoint, count: int, inputs: int) -> torch.Tensor:
        import torch

        if self.groups is None:
            return torch.arange(inputs) // self.group_size
        group: torch.Tensor = source.read(self.groups).long()
        if int(group.min()) < 0 or int(group.max()) >= count:
            raise CheckpointError(
                f"{source.location}: tensor {self.groups!r}: groups {int(group.min())} to {int(group.max())}, but "
                f"there are {count}; download or copy the checkpoint again"
            )
        return group


@dataclass(frozen=True, kw_only=True)
class AwqTensor(QuantizedTensor):
    """An AWQ weight w = scale * (code - zero), with scale and zero of the group of the input, in float32."""

    scales: str
    zeros: str
    group_size: int

    def read_rows(self, source: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Read the whole weight, because outputs are the last dimension of the stored codes."""
        import torch

        weight: torch.Tensor = self._unpacked(source.read(self.codes), start, stop).to(torch.float32)
        weight -= self._unpacked(source.read(self.zeros), start, stop).repeat_interleave(self.group_size, dim=0)
        weight *= source.read(self.scales)[:, start:stop].to(torch.float32).repeat_interleave(self.group_size, dim=0)
        return weight.T.contiguous()

    @staticmethod
    def _unpacked(words: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Unpack and reorder codes: [n, out / 8] int32 -> [n, stop - start] uint8."""
        first = start // len(_AWQ_PLACES)
        words = words[:, first : -(-stop // len(_AWQ_PLACES))]
        codes = unpack_words(words, _AWQ_BITS).unflatten(-1, (-1, len(_AWQ_PLACES)))
        start, stop = (position - first * len(_AWQ_PLACES) for position in (start, stop))
        ordered: torch.Tensor = codes[..., list(_AWQ_PLACES)].flatten(-2)
        return ordered[:, start:stop]


def find_gptq(codes: TensorInfo, stored: Stored) -> QuantizedTensor | None:
    """Recognise a weight of GPTQ or AWQ, or return None.

    Raises:
        UnconvertibleError: if a part is missing or does not fit, or the layout is unknown.
    """
    module, _, leaf = codes.name.rpartition(".")
    if leaf != "qweight" or codes.dtype == "int8":  # one code a byte is not packed
        return None
    prefix = f"{module}." if module else ""
    expect(codes, codes.shape, WORDS)
    scales, zeros = stored.need(prefix + "scales"), stored.need(prefix + "qzeros")
    if len(codes.shape) != 2 or len(scales.shape) != 2 or 0 in (*codes.shape, *scales.shape):
        raise UnconvertibleError(f"'qweight' {shown(codes.shape)} with 'scales' {shown(scales.shape)}")
    if codes.shape[1] == scales.shape[1]:
        return _gptq(codes, scales, zeros, stored, prefix)
    return _awq(codes, scales, zeros, stored, prefix)


def _gptq(codes: TensorInfo, scales: TensorInfo, zeros: TensorInfo, stored: Stored, prefix: str) -> QuantizedTensor:
    layout = stored.settings.layout
    if layout not in _ZERO_STORED_LESS_ONE or (layout is None and stored.settings.method not in (None, "gptq")):
        raise UnconvertibleError(f"the layout {layout or stored.settings.named!r} is not known")
    groups, outputs = scales.shape
    if len(zeros.shape) != 2 or zeros.shape[1] * WORD % outputs:
        raise UnconvertibleError(f"'qzeros' {shown(zeros.shape)} do not fit 'scales' {shown(scales.shape)}")
    bits = zeros.shape[1] * WORD // outputs
    if bits not in _GPTQ_BITS:
        raise UnconvertibleError(f"{bits} bits (known are 2, 3, 4 and 8)")
    expect(zeros, (groups, outputs * bits // WORD), WORDS)
    if codes.shape[0] * WORD % bits or (WORD % bits and codes.shape[0] % bits):
        raise UnconvertibleError(f"'qweight' {shown(codes.shape)} does not hold codes of {bits} bits")
    inputs = codes.shape[0] * WORD // bits
    index = stored.find(prefix + "g_idx")
    if index is not None:
        expect(index, (inputs,), _INTEGERS)
    return GptqTensor(
        info=logical(
            codes,
            name=prefix + "weight",
            shape=(outputs, inputs),
            quantization=f"gptq {bits}-bit",
            roundoff=integer_roundoff(bits, -(-inputs // groups)),
        ),
        codes=codes.name,
        bits=bits,
        scales=scales.name,
        zeros=zeros.name,
        groups=None if index is None else index.name,
        group_size=_group_size(inputs, groups, stored) if index is None else 0,
        less_one=_ZERO_STORED_LESS_ONE[layout],
    )


def _group_size(inputs: int, groups: int, stored: Stored) -> int:
    """Return the size of consecutive groups; the last may be smaller if the configuration says so."""
    for size in stored.settings.group_sizes:
        if -(-inputs // size) == groups:
            return size
    if inputs % groups:
        raise UnconvertibleError(f"{groups} groups of {inputs} inputs, and no 'g_idx'")
    return inputs // groups


def _awq(codes: TensorInfo, scales: TensorInfo, zeros: TensorInfo, stored: Stored, prefix: str) -> QuantizedTensor:
    inputs, groups = codes.shape[0], scales.shape[0]
    known = stored.settings.layout in _AWQ_LAYOUTS and stored.settings.bits <= {_AWQ_BITS}
    if not known or codes.shape[1] * WORD != scales.shape[1] * _AWQ_BITS or inputs % groups:
        raise UnconvertibleError(
            f"'qweight' {shown(codes.shape)} with 'scales' {shown(scales.shape)} is neither GPTQ's nor AWQ's 4-bit "
            f"GEMM layout ({stored.settings.named}, {stored.settings.layout or 'no version'})"
        )
    expect(zeros, (groups, codes.shape[1]), WORDS)
    return AwqTensor(
        info=logical(
            codes,
            name=prefix + "weight",
            shape=(scales.shape[1], inputs),
            quantization=f"awq {_AWQ_BITS}-bit",
            roundoff=integer_roundoff(_AWQ_BITS, inputs // groups),
        ),
        codes=codes.name,
        scales=scales.name,
        zeros=zeros.name,
        group_size=inputs // groups,
    )
