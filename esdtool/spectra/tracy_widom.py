"""The Tracy-Widom law: how far the largest eigenvalue of noise reaches beyond the Marchenko-Pastur edge."""

from __future__ import annotations

import math

_QUANTILE = 3.2722
"""The 99.9 % quantile of the Tracy-Widom law of order 1 (Tracy and Widom 1996)."""


def noise_ceiling(rows: int, columns: int) -> float:
    """Return what the largest eigenvalue of W^T W exceeds once in a thousand random matrices.

    With mu = (sqrt(m - 1) + sqrt n)^2 and s = (sqrt(m - 1) + sqrt n) (1 / sqrt(m - 1) + 1 / sqrt n)^(1/3), m >= n, the
    largest eigenvalue less mu, over s, follows the Tracy-Widom law of order 1 (Johnstone 2001, theorem 1.1).

    >>> round(noise_ceiling(400, 100), 1)
    950.6

    Args:
        rows: rows of a matrix with independent elements of variance 1.
        columns: columns of that matrix.
    """
    long, short = math.sqrt(max(max(rows, columns) - 1, 1)), math.sqrt(min(rows, columns))
    centre, width = (long + short) ** 2, (long + short) * math.cbrt(1 / long + 1 / short)
    return centre + _QUANTILE * width
