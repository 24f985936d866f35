"""`farms`: `hill` on the pooled eigenvalues of windows of one aspect ratio (FARMS, ICML 2025, arXiv 2506.06280).

The ESD of a matrix depends on its aspect ratio even before training: an MLP matrix (2.7 : 1)
and a square attention matrix differ by geometry alone. FARMS slides windows of one shape over
every matrix and pools their eigenvalues, so that alphas of different modules compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from esdtool.spectra.estimator import Estimator, SubMatrices
from esdtool.spectra.estimators import hill
from esdtool.spectra.options import ScoreOptions

if TYPE_CHECKING:
    import torch


def farms_windows(
    matrices: Sequence[torch.Tensor], *, rows: int = 100, ratio: float = 2.0, windows: int = 10
) -> list[torch.Tensor]:
    """Cut windows [r, c] out of each matrix laid with its short side as rows; they are views, no copies.

    There are up to `windows` positions per dimension, at a constant step that spreads them over the matrix, as in the
    published code. A matrix that is smaller than the window gets the largest window of the same aspect ratio that fits.

    Args:
        matrices: tensors of one shape [m, n].
        rows: rows of a window (published for LLaMA: 2000).
        ratio: columns over rows, at least 1 (published for LLaMA: 1).
        windows: positions per dimension (published for LLaMA: 15).

    >>> import torch
    >>> [tuple(window.shape) for window in farms_windows([torch.zeros(120, 240)], windows=2)]
    [(100, 200), (100, 200), (100, 200), (100, 200)]
    """
    if rows < 1 or windows < 1 or ratio < 1:
        raise ValueError(f"a FARMS window needs rows >= 1, windows >= 1 and ratio >= 1, not {rows}, {windows}, {ratio}")
    pooled = []
    for matrix in matrices:
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        height, width = farms_shape(tuple(matrix.shape), rows=rows, ratio=ratio)
        for top in _starts(wide.shape[0], height, windows):
            for left in _starts(wide.shape[1], width, windows):
                pooled.append(wide[top : top + height, left : left + width])
    return pooled


def farms_shape(shape: tuple[int, ...], *, rows: int, ratio: float) -> tuple[int, int]:
    """Compute the shape of a window on a matrix of this shape."""
    short, long = sorted(shape)
    height = max(1, min(rows, short, int(long / ratio)))
    return height, min(long, int(height * ratio))


def _starts(size: int, window: int, count: int) -> list[int]:
    """Spread the offsets of at most `count` windows along one dimension."""
    if count == 1 or size == window:
        return [0]
    step = max(1, (size - window) // (count - 1))
    return list(range(0, size - window + 1, step))[:count]


def _cut(matrices: Sequence[torch.Tensor], options: ScoreOptions) -> list[torch.Tensor]:
    return farms_windows(matrices, rows=options.farms_rows, ratio=options.farms_ratio, windows=options.farms_windows)


ESTIMATOR = Estimator(
    fit=hill.ESTIMATOR.fit,
    options=hill.ESTIMATOR.options,
    xmin_index=hill.ESTIMATOR.xmin_index,
    sub_matrices=SubMatrices(cut=_cut, options=("farms_rows", "farms_ratio", "farms_windows")),
)
