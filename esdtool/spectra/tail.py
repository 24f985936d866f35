"""A power law in the tail of a spectrum.

A heavy-tailed ESD behaves as p(lambda) ~ lambda^-alpha for lambda >= xmin. At a given xmin the maximum-likelihood
exponent is

    alpha = 1 + k / sum_{lambda_j >= xmin} ln(lambda_j / xmin),    k = number of eigenvalues in the tail

(Hill 1975; Clauset, Shalizi and Newman 2009). The estimators (`esdtool.spectra.estimators`) differ in how they choose
xmin. Logarithms are summed in float64: float32 sums alone would shift alpha by 1e-4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esdtool.support.lazy import exporter

Vector = npt.NDArray[np.float64]

# The documentation of earlier versions had the functions here.
__getattr__ = exporter(
    "esdtool.spectra.estimators",
    {
        "hill": "hill",
        "hill_index": "hill",
        "ks_fit": "ks",
        "ks_distances": "ks",
        "fix_finger_fit": "fix_finger",
    },
)


@dataclass(frozen=True, kw_only=True)
class LikelihoodRatio:
    """A likelihood-ratio test of the power law against one other distribution on the same tail."""

    ratio: float
    """Normalised log-likelihood ratio; positive favours the power law."""
    p_value: float
    """Probability of a ratio at least as large if neither distribution were better."""


@dataclass(frozen=True, kw_only=True)
class TailFit:
    """A power law fitted to the tail of a spectrum."""

    alpha: float
    """Exponent of the density; smaller is heavier-tailed. Infinite if all eigenvalues in the tail are equal."""
    xmin: float
    """Smallest eigenvalue of the tail."""
    xmin_index: int
    """Index of xmin in the given ascending eigenvalues."""
    num_tail: int
    """Number of eigenvalues in the tail, xmin included."""
    ks_distance: float
    """max_j |1 - (lambda_j / xmin)^(1 - alpha) - j / num_tail|, j = 0 .. num_tail - 1."""
    comparisons: dict[str, LikelihoodRatio] | None = None
    """Tests against other distributions by their names, from an estimator that makes them."""

    @property
    def alpha_stderr(self) -> float:
        """Standard error of alpha, (alpha - 1) / sqrt(num_tail) (Clauset, Shalizi and Newman 2009, eq. 3.2)."""
        return (self.alpha - 1) / math.sqrt(self.num_tail)

    @property
    def mean_log_spread(self) -> float:
        """Mean of ln(lambda_j / xmin) over the tail, 1 / (alpha - 1)."""
        return 0.0 if math.isinf(self.alpha) else 1 / (self.alpha - 1)


def ascending(eigenvalues: npt.ArrayLike) -> Vector:
    """Check eigenvalues of any shape and order, and return them as a sorted float64 copy [n].

    Raises:
        ValueError: if there are fewer than two, or one is not finite.
    """
    ordered = np.sort(np.asarray(eigenvalues, dtype=np.float64).reshape(-1))
    if ordered.size < 2:
        raise ValueError(f"a tail fit needs at least two eigenvalues, not {ordered.size}")
    if not np.isfinite(ordered).all():
        raise ValueError("eigenvalues must be finite")
    return ordered


def fit_at(ordered: Vector, index: int) -> TailFit:
    """Fit the maximum-likelihood power law at a given xmin.

    Args:
        ordered: [n] ascending; positive from `index` on.
        index: position of xmin.
    """
    logs = np.log(ordered[index:]) - math.log(ordered[index])
    total = float(logs.sum())
    num_tail = logs.size
    alpha = 1 + num_tail / total if total > 0 else math.inf
    distance = kolmogorov_smirnov(logs, alpha) if total > 0 else 0.0
    return TailFit(alpha=alpha, xmin=float(ordered[index]), xmin_index=index, num_tail=num_tail, ks_distance=distance)


def kolmogorov_smirnov(logs: Vector, alpha: float) -> float:
    """Kolmogorov-Smirnov distance between a tail and its power law.

    Args:
        logs: [k] ln(lambda_j / xmin) of the tail, ascending.
        alpha: exponent of the power law.
    """
    model = -np.expm1((1 - alpha) * logs)
    return float(np.abs(model - np.arange(logs.size) / logs.size).max())
