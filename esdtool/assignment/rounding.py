"""Measure what rounding changes in weights: the mean square error of a symmetric quantiser with a step for each row.

It is the plain round-to-nearest that other methods are compared with: a row's largest absolute value becomes the
largest of the 2^b - 1 levels from -(2^(b-1) - 1) to 2^(b-1) - 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rounded_rows(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Round each row to the nearest of 2^b - 1 levels.

    Args:
        rows: [rows, columns], floating point.
        bits: width, at least 2.

    Returns:
        [rows, columns] of the same dtype; rows of zeros stay.
    """
    levels = 2 ** (bits - 1) - 1
    step = rows.abs().amax(dim=1, keepdim=True) / levels
    rounded: torch.Tensor = (rows / step.where(step > 0, 1)).round() * step
    return rounded


def rounding_errors(blocks: Iterable[torch.Tensor], widths: Sequence[int]) -> list[float]:
    """Measure the mean square of what rounding to each width changes.

    Args:
        blocks: [rows, columns] each, all the rows of a parameter, some at a time; floating point.
        widths: in bits, at least 2.

    Returns:
        [widths] mean square errors.
    """
    totals, count = [0.0] * len(widths), 0
    for block in blocks:
        rows = block.float()
        count += rows.numel()
        for place, bits in enumerate(widths):
            totals[place] += float((rows - rounded_rows(rows, bits)).double().square().sum())
    return [total / max(count, 1) for total in totals]
