"""`hill`: a fixed fraction of the eigenvalues in the tail (Hill 1975; "PL_Alpha_Hill" of AlphaDecay)."""

from __future__ import annotations

import math

import numpy.typing as npt

from esdtool.spectra.estimator import Estimator
from esdtool.spectra.tail import TailFit, ascending, fit_at


def hill(eigenvalues: npt.ArrayLike, *, k_fraction: float = 0.5) -> TailFit:
    """Hill estimator with a fixed fraction of the eigenvalues in the tail (Hill 1975; AlphaDecay, arXiv 2506.14562).

    The tail starts at `hill_index`: half of the eigenvalues by default ("PL_Alpha_Hill").

    >>> round(hill([1 / i**2 for i in range(1, 65)]).alpha, 5)
    1.54523

    Args:
        eigenvalues: [n], n >= 2, any order, not negative.
        k_fraction: fraction of the eigenvalues in the tail, in (0, 1].

    Raises:
        ValueError: if there are fewer than two eigenvalues or the one at xmin is not positive.
    """
    if not 0 < k_fraction <= 1:
        raise ValueError(f"k_fraction must be in (0, 1], not {k_fraction}")
    ordered = ascending(eigenvalues)
    index = hill_index(ordered.size, k_fraction)
    if ordered[index] <= 0:
        raise ValueError(f"the tail starts at eigenvalue {ordered[index]:g}: it must be positive")
    return fit_at(ordered, index)


def hill_index(size: int, k_fraction: float = 0.5) -> int:
    """Ascending index of the Hill estimator's xmin: floor(n (1 - k_fraction)), n // 2 by default; at least two follow.

    >>> hill_index(101), hill_index(100, 0.1)
    (50, 90)
    """
    # 100 * (1 - 0.1) is 90.00000000000001 or 89.99999999999999 depending on the numbers: both mean 90.
    return max(0, min(math.floor(size * (1 - k_fraction) + 1e-9), size - 2))


ESTIMATOR = Estimator(
    fit=lambda eigenvalues, options: hill(eigenvalues, k_fraction=options.k_fraction),
    options=("k_fraction",),
    xmin_index=lambda size, options: hill_index(size, options.k_fraction),
)
