"""Say what the elements of a matrix tell without its spectrum: rows and columns that are zero or huge.

One pass over the elements, in blocks, beside which an eigenvalue decomposition takes a hundred times as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from esdtool.spectra.spectrum import peak_of

Vector = npt.NDArray[np.float64]

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
class TrapStatistics:
    """Elements so large that each makes an eigenvalue of its own, which survives a shuffle of all elements.

    After a shuffle a matrix [N, M] is noise of standard deviation s around its few large elements. One of distance
    theta from the mean leaves the bulk if theta > s (N M)^(1/4), and its eigenvalue is then
    (theta^2 + s^2 N)(theta^2 + s^2 M) / theta^2 (Benaych-Georges and Nadakuditi 2012).
    """

    count: int
    """Number of those elements."""
    row: int
    """Row of the largest one."""
    column: int
    """Column of the largest one."""
    deviation: float
    """Distance of the largest one from the mean over the standard deviation of all others."""
    eigenvalue: float
    """The eigenvalue that it makes, in units of the weights' squares."""


@dataclass(frozen=True, kw_only=True)
class ElementStatistics:
    """Sums over the elements of one module's matrices, which are taken together."""

    rows: ChannelStatistics
    columns: ChannelStatistics
    largest: float
    """Largest absolute element."""
    traps: TrapStatistics | None
    """The elements that make eigenvalues of their own; None where there are none, or several matrices."""


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
    by_row, by_column, total, fourth = np.zeros(rows), np.zeros(columns), 0.0, 0.0
    step = max(1, _BLOCK // columns)
    for matrix in matrices:
        for start in range(0, rows, step):
            # Over the largest element: squares do not overflow, and what vanishes is of no account.
            scaled = matrix[start : start + step].cpu().to(torch.float64) / largest
            squares = scaled.square()
            total += float(scaled.sum())
            fourth += float(squares.square().sum())
            by_row[start : start + step] += squares.sum(dim=1).numpy()
            by_column += squares.sum(dim=0).numpy()
    traps = None
    size = rows * columns * len(matrices)
    # Variance of a squared element over the square of its mean.
    variation = max(fourth / size / (float(by_row.sum()) / size) ** 2 - 1, 0.0)
    if len(matrices) == 1:
        spread = math.sqrt(max(float(by_row.sum()) / size - (total / size) ** 2, 0.0))
        # No element is farther from the mean than this; nearly all matrices are done here.
        if 1 + abs(total / size) > size**0.25 * spread:
            traps = _traps(matrices[0], largest)
    return ElementStatistics(
        rows=_channels(by_row, variation * rows / size),
        columns=_channels(by_column, variation * columns / size),
        largest=largest,
        traps=traps,
    )


def _traps(matrix: torch.Tensor, largest: float) -> TrapStatistics | None:
    """Find the elements beyond the threshold.

    Args:
        matrix: [rows, columns], finite, not all zero.
        largest: its largest absolute element.
    """
    rows, columns = matrix.shape
    elements = matrix.cpu().to(torch.float64) / largest
    distances = (elements - elements.mean()).abs()
    beyond = distances > (rows * columns) ** 0.25 * float(distances.square().mean()) ** 0.5
    if not beyond.any():
        return None
    spread = float(distances[~beyond].square().mean()) ** 0.5
    place = int(distances.argmax())
    theta = float(distances.flatten()[place])
    eigenvalue = (theta**2 + spread**2 * rows) * (theta**2 + spread**2 * columns) / theta**2 * largest * largest
    if spread == 0 or not math.isfinite(eigenvalue):
        return None  # no noise to stand out from, or no number of that size
    return TrapStatistics(
        count=int(beyond.sum()),
        row=place // columns,
        column=place % columns,
        deviation=theta / spread,
        eigenvalue=eigenvalue,
    )


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
