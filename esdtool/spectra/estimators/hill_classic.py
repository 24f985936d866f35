"""`hill-classic`: a tenth of the eigenvalues over the one just below them (Hill 1975; AlphaQ, arXiv 2606.04980).

With the k largest eigenvalues, k = n // 10 but at least 10 and at most n - 1, alpha = 1 + k / sum ln(lambda_i / x),
where x is the largest eigenvalue that is not among them. `hill` counts x into the tail.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from esdtool.spectra.estimator import Estimator
from esdtool.spectra.tail import TailFit, ascending, kolmogorov_smirnov


def hill_classic(eigenvalues: npt.ArrayLike) -> TailFit:
    """Estimate alpha from the largest tenth of the eigenvalues.

    >>> round(hill_classic([1 / i**2 for i in range(1, 65)]).alpha, 5)
    1.56341

    Args:
        eigenvalues: [n], n >= 2, any order, not negative.

    Raises:
        ValueError: if there are fewer than two eigenvalues, the one below the tail is not positive, or all of the tail
            are equal to it.
    """
    ordered = ascending(eigenvalues)
    index = classic_index(ordered.size)
    xmin = float(ordered[index])
    if xmin <= 0:
        raise ValueError(f"the eigenvalue below the tail is {xmin:g}: it must be positive")
    logs = np.log(ordered[index + 1 :]) - np.log(xmin)
    total = float(logs.sum())
    if total <= 0:
        raise ValueError("constant spectrum: all eigenvalues are equal, alpha is infinite")
    alpha = 1 + logs.size / total
    return TailFit(
        alpha=alpha,
        xmin=xmin,
        xmin_index=index,
        num_tail=logs.size,
        ks_distance=kolmogorov_smirnov(logs, alpha),
    )


def classic_index(size: int) -> int:
    """Return the ascending index of the eigenvalue below the tail, of n.

    >>> classic_index(64), classic_index(1000), classic_index(5)
    (53, 899, 0)
    """
    return size - 1 - max(1, min(max(10, size // 10), size - 1))


ESTIMATOR = Estimator(
    fit=lambda eigenvalues, _: hill_classic(eigenvalues), xmin_index=lambda size, _: classic_index(size)
)
