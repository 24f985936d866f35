"""Determine which elements of a weight share a scale: all of them, a row, or a block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esdtool.checkpoint.quantized.base import UnconvertibleError, shown
from esdtool.checkpoint.quantized.settings import Block

if TYPE_CHECKING:
    import torch

WEIGHT_SCALES = ("weight_scale_inv", "weight_scale", "weight.scale", "weight_scales", "scale_weight", "weight._scale")
"""Suffixes of the tensors that turn the values of `weight` from codes into weights."""

USUAL_BLOCK = 128
"""Block size of DeepSeek-V3 (arXiv 2412.19437) and of nearly all later fp8 checkpoints."""

_STANDARD = (16, 32, 64, 128, 256, 512)
"""Block sizes to consider if the configuration names none."""


@dataclass(frozen=True, kw_only=True)
class ScaleGrid:
    """A grid of scales over a weight with the same number of dimensions."""

    shape: tuple[int, ...]
    """Shape of the scales, with a 1 in each dimension where one scale covers all positions."""
    block: tuple[int, ...]
    """Number of positions in each dimension that share a scale; the last block may be cut off."""

    @property
    def group(self) -> int:
        """Number of elements that share a scale."""
        return math.prod(self.block)

    def spread(self, scales: torch.Tensor, size: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """Expand the scales so that they broadcast over positions `start` to `stop` of a weight of shape `size`."""
        spread = scales.reshape(self.shape)
        for axis, (count, block, length) in enumerate(zip(self.shape, self.block, size, strict=True)):
            first, last = (start, stop) if axis == 0 else (0, length)
            if count == 1:
                continue
            begin = first // block
            part = spread.narrow(axis, begin, -(-last // block) - begin)
            if block > 1:
                part = part.repeat_interleave(block, dim=axis).narrow(axis, first - begin * block, last - first)
            spread = part
        return spread


def fit_scales(
    weight: tuple[int, ...], scales: tuple[int, ...], blocks: Sequence[Block] = (), *, last_axis: bool = False
) -> ScaleGrid:
    """Determine which elements of `weight` share a scale.

    >>> fit_scales((256, 300), (2, 3)).block
    (128, 128)

    Args:
        weight: [out, in], [experts, out, in] or the kernel of a convolution [out, in, ...].
        scales: a single one; [out] or [out, 1]; [blocks of rows, blocks of columns]; for stacked experts the same with
            a first dimension for them.
        blocks: the shapes of a block that the configuration names. The first one that fits the scales is taken.
            If none fits, a standard size that gives the right number of blocks is taken.
        last_axis: stacked weights are [experts, in, out] (FBGEMM's), and have a scale for each output.

    Raises:
        UnconvertibleError: if they do not fit, or in several ways.
    """
    if math.prod(weight) == 0:
        raise UnconvertibleError(f"it is empty, {shown(weight)}")
    if math.prod(scales) == 1:
        return _grid(weight, (1,) * len(weight))
    if len(weight) == 3 and len(scales) <= 3 and scales[0] == weight[0]:
        return _stacked(weight, scales, blocks, last_axis=last_axis)
    if math.prod(scales) == scales[0] == weight[0]:
        return _grid(weight, (weight[0], *(1 for _ in weight[1:])))
    if len(weight) == len(scales) == 2:
        return _grid(weight, scales, blocks)
    raise _misfit(weight, scales)


def _stacked(
    weight: tuple[int, ...], scales: tuple[int, ...], blocks: Sequence[Block], *, last_axis: bool
) -> ScaleGrid:
    experts, rows, columns = weight
    each = math.prod(scales) // experts
    if last_axis:
        if each != columns:
            raise _misfit(weight, scales)
        return _grid(weight, (experts, 1, columns))
    if each == 1:
        return _grid(weight, (experts, 1, 1))
    if len(scales) == 2:
        if rows == columns == each:
            raise UnconvertibleError(f"scales {shown(scales)} may be for rows or columns of {shown(weight)}")
        if each not in (rows, columns):
            raise _misfit(weight, scales)
        return _grid(weight, (experts, rows, 1) if each == rows else (experts, 1, columns))
    if scales[1:] == (2, 1) and columns > USUAL_BLOCK and rows % 2 == 0:
        # The gate's and the up-projection's own scale; blocks would divide the columns, too.
        return ScaleGrid(shape=scales, block=(1, rows // 2, columns))
    return _grid(weight, scales, blocks)


def _grid(weight: tuple[int, ...], scales: tuple[int, ...], blocks: Sequence[Block] = ()) -> ScaleGrid:
    leading = tuple(size if count == 1 else 1 for size, count in zip(weight[:-2], scales[:-2], strict=True))
    for block in blocks:
        if all(-(-size // b) == n for size, n, b in zip(weight[-2:], scales[-2:], block, strict=True)):
            return ScaleGrid(shape=scales, block=(*leading, *block))
    found = (_block(size, count, weight, scales) for size, count in zip(weight[-2:], scales[-2:], strict=True))
    return ScaleGrid(shape=scales, block=(*leading, *found))


def _block(size: int, count: int, weight: tuple[int, ...], scales: tuple[int, ...]) -> int:
    """Return the size of the blocks of which `count` cover `size` positions."""
    if count in (1, size):
        return size // count
    candidates = {block for block in _STANDARD if -(-size // block) == count}
    if count == 2 and size % 2 == 0:
        candidates.add(size // 2)  # two weights in one, each with its own scale
    if USUAL_BLOCK in candidates:
        return USUAL_BLOCK
    if len(candidates) > 1:
        listed = ", ".join(map(str, sorted(candidates)))
        raise UnconvertibleError(f"scales {shown(scales)} of {shown(weight)} may be for blocks of {listed}")
    if not candidates:
        raise _misfit(weight, scales)
    return candidates.pop()


def _misfit(weight: tuple[int, ...], scales: tuple[int, ...]) -> UnconvertibleError:
    return UnconvertibleError(f"scales {shown(scales)} do not fit codes {shown(weight)}")
