"""Unpacking: integers of a few bits out of bytes and words."""

from __future__ import annotations

import torch

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""E2M1, by code (OCP Microscaling Formats, 2023)."""


def nibbles(packed: torch.Tensor, *, low_first: bool) -> torch.Tensor:
    """The 4-bit codes in bytes: uint8 [..., n] -> int64 [..., 2 n]."""
    codes = packed.to(torch.int64)
    pair = (codes & 15, codes >> 4)
    return torch.stack(pair if low_first else pair[::-1], dim=-1).flatten(-2)


def fields(packed: torch.Tensor, bits: int, dim: int, count: int | None = None) -> torch.Tensor:
    """Unsigned integers of `bits` bits that fill 32-bit words one after the other, across their borders if need be.

    Args:
        packed: int32.
        bits: 1 to 16.
        dim: the dimension along which words hold several integers.
        count: how many there are; default as many as fit.

    Returns:
        int64, `count` long in `dim`.
    """
    words = packed.movedim(dim, 0).to(torch.int64) & 0xFFFFFFFF
    total = words.shape[0] * 32 // bits if count is None else count
    start = torch.arange(total, device=packed.device) * bits
    word, offset = start // 32, start % 32
    following = torch.cat([words, torch.zeros_like(words[:1])])
    shape = (-1, *([1] * (words.ndim - 1)))
    joined = following[word] | following[word + 1] << 32  # at most 16 of the upper 32 bits are looked at
    return ((joined >> offset.reshape(shape)) & ((1 << bits) - 1)).movedim(0, dim)


def fields_of_words(packed: torch.Tensor, bits: int, dim: int, count: int) -> torch.Tensor:
    """As `fields`, but no integer crosses the border of a word: the bits left over at its end are empty."""
    words = packed.movedim(dim, -1).to(torch.int64) & 0xFFFFFFFF
    shifts = torch.arange(32 // bits, device=packed.device) * bits
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count].movedim(-1, dim)
