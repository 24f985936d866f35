"""The Marchenko-Pastur law: the spectrum of a random matrix, as the untrained null.

For W [m, n], m >= n, of independent elements with variance s2, the eigenvalues of W^T W over
m s2 fill the interval [(1 - sqrt q)^2, (1 + sqrt q)^2], q = n / m, with density

    sqrt((b - x)(x - a)) / (2 pi q x)

(Marchenko and Pastur 1967). An alpha fitted to its quantiles is what the shape of a matrix
alone gives, with no random draw; the distance of a trained module from it is learning.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

_GRID = 16385


def mp_edges(rows: int, columns: int) -> tuple[float, float]:
    """Support of the eigenvalues of W^T W for elements of variance 1: (sqrt(long) -+ sqrt(short))^2.

    >>> mp_edges(400, 100)
    (100.0, 900.0)
    """
    long, short = math.sqrt(max(rows, columns)), math.sqrt(min(rows, columns))
    return (long - short) ** 2, (long + short) ** 2


def mp_density(eigenvalues: npt.ArrayLike, rows: int, columns: int, *, mean_square: float = 1.0) -> Vector:
    """Density of the eigenvalues of W^T W for a random [rows, columns] matrix, at given eigenvalues.

    >>> low, high = mp_edges(400, 100)
    >>> grid = np.linspace(low, high, 100_001)
    >>> round(float(np.trapezoid(mp_density(grid, 400, 100), grid)), 4)
    1.0

    Args:
        eigenvalues: [k], positive.
        rows: rows of the matrix.
        columns: columns of the matrix.
        mean_square: variance of the elements.

    Returns:
        [k] float64: the density of the min(rows, columns) eigenvalues that are not zero by construction; 0 outside
        the support.
    """
    low, high = mp_edges(rows, columns)
    # In units of the variance, where products of eigenvalues of any scale stay within float64.
    with np.errstate(over="ignore"):
        x = np.asarray(eigenvalues, dtype=np.float64) / mean_square
        inside = np.clip((high - x) * (x - low), 0.0, None)
        density: Vector = np.sqrt(inside) / (2 * math.pi * min(rows, columns) * x) / mean_square
    return density


@lru_cache(maxsize=64)
def mp_quantiles(rows: int, columns: int, count: int | None = None) -> Vector:
    """Expected eigenvalues of W^T W for a random [rows, columns] matrix with elements of variance 1, ascending.

    They are the quantiles of the Marchenko-Pastur law at (i + 1/2) / count.

    Args:
        rows: rows of the matrix.
        columns: columns of the matrix.
        count: number of quantiles; default min(rows, columns). A pool of several matrices has more.

    Returns:
        [count] float64, not writable (the result is cached).
    """
    count = min(rows, columns) if count is None else count
    middle, half, theta, cumulative = _distribution(rows, columns)
    levels = (np.arange(count) + 0.5) / count
    angles = np.interp(levels, cumulative, theta)
    quantiles = middle - half * np.cos(angles)
    quantiles.flags.writeable = False
    return quantiles


def mp_cumulative(eigenvalues: npt.ArrayLike, rows: int, columns: int) -> Vector:
    """Distribution function of the Marchenko-Pastur law for elements of variance 1, at given eigenvalues.

    >>> mp_cumulative([0.0, 100.0, 900.0], 400, 100).tolist()
    [0.0, 0.0, 1.0]

    Args:
        eigenvalues: [k], any order.
        rows: rows of the matrix.
        columns: columns of the matrix.

    Returns:
        [k] float64 in [0, 1]: shares of the min(rows, columns) eigenvalues at or below each.
    """
    middle, half, theta, cumulative = _distribution(rows, columns)
    cosines = np.clip((middle - np.asarray(eigenvalues, dtype=np.float64)) / half, -1.0, 1.0)
    shares: Vector = np.interp(np.arccos(cosines), theta, cumulative)
    return shares


@lru_cache(maxsize=64)
def _distribution(rows: int, columns: int) -> tuple[float, float, Vector, Vector]:
    """Tabulate the distribution function for variance 1: middle and half width of the support, angles, shares.

    With x = middle - half cos(theta) the density has no singularity, not even at q = 1, where x reaches 0.
    """
    low, high = mp_edges(rows, columns)
    theta = np.linspace(0.0, math.pi, _GRID)
    half, middle = (high - low) / 2, (high + low) / 2
    # The integral of sin^2(theta) / x in closed form, by the substitution t = tan(theta / 2).
    angle = 2 * np.arctan2(math.sqrt(high) * np.sin(theta / 2), math.sqrt(low) * np.cos(theta / 2))
    cumulative = middle * theta + half * np.sin(theta) - math.sqrt(low * high) * angle
    cumulative /= cumulative[-1]
    return middle, half, theta, cumulative
