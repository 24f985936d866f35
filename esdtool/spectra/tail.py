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
class ModifiedLaw:
    """Hold what a law lambda^-alpha that ends or bends has beside alpha; a pure power law has none of it."""

    log_spread: float
    """Mean of ln(lambda_j / xmin) over the tail."""
    information: float | None
    """Fisher information of one eigenvalue about alpha, marginal over the law's other parameter; None where the
    likelihood has no interior maximum, so that nothing is known about the error of alpha."""
    xmax: float | None = None
    """Where the law ends, in the units of xmin; None for one that does not."""
    truncation: float | None = None
    """Lambda of the factor exp(-Lambda lambda), in the inverse units of xmin; None for a law without it."""


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
    """max_j |F(lambda_j) - j / num_tail|, j = 0 .. num_tail - 1, with the law's distribution function F; for a pure
    power law 1 - (lambda_j / xmin)^(1 - alpha)."""
    comparisons: dict[str, LikelihoodRatio] | None = None
    """Tests against other distributions by their names, from an estimator that makes them."""
    best_law: str | None = None
    """The best of the distributions compared, in words."""
    law: ModifiedLaw | None = None
    """What the law has beside alpha; None for a pure power law."""

    @property
    def alpha_stderr(self) -> float | None:
        """Standard error of alpha; None where it is not known.

        For a pure power law (alpha - 1) / sqrt(num_tail) (Clauset, Shalizi and Newman 2009, eq. 3.2).
        """
        if self.law is None:
            return (self.alpha - 1) / math.sqrt(self.num_tail)
        return None if self.law.information is None else 1 / math.sqrt(self.num_tail * self.law.information)

    @property
    def sensitivity(self) -> float:
        """Relative change of alpha over the relative change of xmin, at most: 1 / (alpha i) with the information i.

        Where alpha is below 1 it is the absolute change. For a pure power law it is (alpha - 1)^2 / alpha.
        """
        if self.law is None:
            return (self.alpha - 1) ** 2 / self.alpha
        return 0.0 if self.law.information is None else 1 / (max(self.alpha, 1.0) * self.law.information)

    @property
    def mean_log_spread(self) -> float:
        """Mean of ln(lambda_j / xmin) over the tail, for a pure power law 1 / (alpha - 1)."""
        if self.law is not None:
            return self.law.log_spread
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
