"""Say what the elements of a matrix tell without its spectrum: rows and columns that are zero or huge.

One pass over the elements, in blocks, beside which an eigenvalue decomposition takes a hundred times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from pydantic import TypeAdapter

from esdtool.spectra.cache import SpectrumCache, note_key
from esdtool.spectra.spectrum import peak_of

Vector = npt.NDArray[np.float64]

VERSION = 1
"""Raise it when the numbers change for the same weights: cached results are then computed again."""

_BLOCK = 2**22
"""Elements that are converted to float64 at a time."""

_ZERO = 1e-10
"""Share of the median channel's sum of squares at or below which a channel counts as zero: weight decay shrinks what
gets no gradient, and never reaches 0."""


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """The rows of a module's matrices, or their columns, by the sums of their squares."""

    count: int
    """Number of channels."""
    num_zero: int
    """Channels whose elements are all zero, or so small beside the median channel's that nothing is left of them."""
    first_zero: int | None
    """Index of the first of those."""
    largest: int
    """Index of the channel with the largest sum of squares."""
    largest_share: float
    """The share of that channel in the sum of squares of all elements."""
    dispersion: float
    """Standard deviation of the channels' sums of squares over what independent elements of the same fourth moment
    give: near 1 for random weights, with a standard error of 1 / sqrt(2 count)."""
    largest_over_upper: float
    """The sum of squares of that channel over the 95th percentile of the channels that are not zero."""


@dataclass(frozen=True, kw_only=True)
class ElementStatistics:
    """Sums over the elements of one module's matrices, which are taken together."""

    rows: ChannelStatistics
    columns: ChannelStatistics
    largest: float
    """Largest absolute element."""


def element_statistics(matrices: Sequence[torch.Tensor]) -> ElementStatistics | None:
    """Compute the statistics of one or several matrices.

    Args:
        matrices: tensors [rows, columns] of one shape, floating point; rows of one index are taken together.

    Returns:
        None if an element is NaN or infinite, or all are zero, or there are none.
    """
    rows, columns = matrices[0].shape
    largest = peak_of(matrices)
    if not np.isfinite(largest) or largest == 0:
        return None
    by_row, by_column, fourth = np.zeros(rows), np.zeros(columns), 0.0
    step = max(1, _BLOCK // columns)
    for matrix in matrices:
        for start in range(0, rows, step):
            # Over the largest element: squares do not overflow, and what vanishes is of no account.
            scaled = matrix[start : start + step].cpu().to(torch.float64) / largest
            squares = scaled.square()
            fourth += float(squares.square().sum())
            by_row[start : start + step] += squares.sum(dim=1).numpy()
            by_column += squares.sum(dim=0).numpy()
    size = rows * columns * len(matrices)
    # Variance of a squared element over the square of its mean.
    variation = max(fourth / size / (float(by_row.sum()) / size) ** 2 - 1, 0.0)
    return ElementStatistics(
        rows=_channels(by_row, variation * rows / size),
        columns=_channels(by_column, variation * columns / size),
        largest=largest,
    )


def known_elements(
    read: Callable[[], Sequence[torch.Tensor]], *, cache: SpectrumCache | None, content: str
) -> ElementStatistics | None:
    """Find the statistics in the cache, or compute them.

    Args:
        read: gives the matrices; called only if the cache does not have the result.
        cache: where results are kept.
        content: `content_hash` of the matrices.
    """
    if cache is None:
        return element_statistics(read())
    key, form = note_key("elements", VERSION, content), TypeAdapter(ElementStatistics | None)
    text = cache.load_note(key)
    if text is not None:
        with suppress(ValueError):
            return form.validate_json(text, strict=True)
    found = element_statistics(read())
    cache.save_note(key, form.dump_json(found).decode())
    return found


def _channels(energy: Vector, variance: float) -> ChannelStatistics:
    """Sum up the channels of one side.

    Args:
        energy: [count] sum of squares of each.
        variance: that of the sum of squares over its squared mean, if all elements were independent.
    """
    zero = energy <= _ZERO * float(np.median(energy[energy > 0]))
    position = int(np.argmax(energy))
    return ChannelStatistics(
        count=energy.size,
        num_zero=int(zero.sum()),
        first_zero=int(np.argmax(zero)) if zero.any() else None,
        largest=position,
        largest_share=float(energy[position] / energy.sum()),
        dispersion=float(energy.std() / energy.mean() / math.sqrt(variance)) if variance > 0 else 0.0,
        largest_over_upper=float(energy[position] / np.quantile(energy[~zero], 0.95)),
    )
