"""The distance of a spectrum from that of a random matrix, in units that compare across shapes and scales.

The sorted eigenvalues lambda_i are set beside the Marchenko-Pastur quantiles q_i of the same shape, brought to the same
sum. The distance is

    sum |lambda_i - q_i| / (2 sum lambda)

the share of the squared Frobenius norm that would have to move to other eigenvalues to make the spectrum random: 0 for
a random matrix, near 1 for one of rank one. It is half the Wasserstein-1 distance of the two densities over their
common mean. A random matrix of n x N has a distance of about 1 / sqrt(n N) (see `random_distance`).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from esdtool.spectra.marchenko_pastur import mp_quantiles

Vector = npt.NDArray[np.float64]


def null_distance(eigenvalues: Vector, rows: int, columns: int) -> float:
    """Compute the share of a spectrum's sum that lies elsewhere than in a random matrix of the same shape.

    >>> null_distance(np.array([1.0, 1.0, 1.0, 1.0]), 4, 10**9) < 1e-4
    True
    >>> round(null_distance(np.array([0.0, 0.0, 0.0, 1.0]), 4, 10**9), 2)
    0.75

    Args:
        eigenvalues: [n] ascending, not all zero; a pool of several matrices' counts as one spectrum.
        rows: rows of each matrix.
        columns: columns of each matrix.

    Returns:
        A number in [0, 1].
    """
    return distance_from(eigenvalues, mp_quantiles(rows, columns, eigenvalues.size))


def distance_from(eigenvalues: Vector, quantiles: Vector) -> float:
    """Compute the share of a spectrum's sum that lies elsewhere than in another spectrum, brought to the same sum.

    Args:
        eigenvalues: [n] ascending, not all zero.
        quantiles: [n] ascending, not all zero: the other one.

    Returns:
        A number in [0, 1].
    """
    total = float(eigenvalues.sum())
    return float(np.abs(eigenvalues / total - quantiles / float(quantiles.sum())).sum()) / 2


def random_distance(rows: int, columns: int, *, num_matrices: int = 1) -> tuple[float, float]:
    """Return the distance that chance alone gives a random matrix: (expected value, standard deviation).

    Fitted to Gaussian and uniform elements from 8 x 8 to 384 x 1536 by `benchmarks/findings.py`; the eigenvalues of a
    random matrix are rigid, so that the distance falls with the size of the matrix and not with its square root.

    Args:
        rows: rows of each matrix.
        columns: columns of each matrix.
        num_matrices: matrices whose eigenvalues are pooled.
    """
    scale = 1 / math.sqrt(rows * columns * num_matrices)
    return (0.35 + 0.13 * math.log(min(rows, columns))) * scale, 0.22 * scale
