"""Unpack several codes from one stored integer, and small floats from their bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WORD = 32
"""Bits of the integers into which GPTQ, AWQ and compressed-tensors pack codes."""


def packed_length(count: int, bits: int) -> int:
    """Return the number of words that `count` codes need.

    >>> packed_length(33, 3)
    4
    """
    return -(-count * bits // WORD)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack codes that are packed without gaps, the first in the lowest bits.

    The words form one stream of bits, so a code of 3 bits may straddle two words: code i has the bits `bits * i` to
    `bits * (i + 1)`.

    Args:
        words: [..., n] int32; n is a multiple of `bits`, or `bits` divides 32.
        bits: 1 to 8.

    Returns:
        [..., n * 32 // bits] uint8.
    """
    import torch

    codes = []
    if WORD % bits == 0:
        codes = [((words >> shift) & ((1 << bits) - 1)).to(torch.uint8) for shift in range(0, WORD, bits)]
        return torch.stack(codes, dim=-1).flatten(-2)
    streams = words.unflatten(-1, (-1, bits))
    for position in range(0, WORD * bits, bits):
        word, shift = divmod(position, WORD)
        low = min(bits, WORD - shift)
        code = (streams[..., word] >> shift) & ((1 << low) - 1)
        if low < bits:
            code = code | ((streams[..., word + 1] & ((1 << (bits - low)) - 1)) << low)
        codes.append(code.to(torch.uint8))
    return torch.stack(codes, dim=-1).flatten(-2)


def unpack_float4(packed: torch.Tensor) -> torch.Tensor:
    """Unpack two E2M1 numbers per byte, the first from the low bits: [..., n] uint8 or int8 -> [..., 2 n] float32.

    E2M1 has a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 (OCP Microscaling Formats
    Specification 1.0, 5.3.3).
    """
    import torch

    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=packed.device)
    values = torch.cat([magnitudes, -magnitudes])
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=-1)  # of each byte
    return pairs[packed.view(torch.uint8).int()].flatten(-2)


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """Convert scales to float32. A byte b means 2^(b - 127), and 255 means NaN (E8M0; same specification, 5.4.1)."""
    import torch

    if scales.dtype != torch.uint8:
        return scales.to(torch.float32)
    powers = torch.exp2(scales.to(torch.float32) - 127)
    return powers.masked_fill(scales == 255, torch.nan)
