"""From eigenvalues to the power-law exponent alpha of their tail.

A heavy-tailed ESD behaves as p(lambda) ~ lambda^-alpha for lambda >= xmin. All estimators
here share the maximum-likelihood (Hill) formula at their xmin,

    alpha = 1 + k / sum_{lambda_j >= xmin} ln(lambda_j / xmin),    k = number of eigenvalues in the tail,

and differ in how they choose xmin. Logarithms are summed in float64: float32 sums alone
would shift alpha by 1e-4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

FIX_FINGER_BINS = 100
_PROBES = 64


@dataclass(frozen=True, kw_only=True)
class TailFit:
    """A power law fitted to the tail of a spectrum."""

    alpha: float
    """Exponent of the density; smaller is heavier-tailed. Infinite if all eigenvalues in the tail are equal."""
    xmin: float
    """Smallest eigenvalue of the tail."""
    xmin_index: int
    """Its index in the ascending eigenvalues that were given."""
    num_tail: int
    """Number of eigenvalues in the tail, xmin included."""
    ks_distance: float
    """max_j |1 - (lambda_j / xmin)^(1 - alpha) - j / num_tail|, j = 0 .. num_tail - 1."""

    @property
    def alpha_stderr(self) -> float:
        """Standard error of alpha, (alpha - 1) / sqrt(num_tail) (Clauset, Shalizi and Newman 2009, eq. 3.2)."""
        return (self.alpha - 1) / math.sqrt(self.num_tail)

    @property
    def mean_log_spread(self) -> float:
        """Mean of ln(lambda_j / xmin) over the tail, 1 / (alpha - 1)."""
        return 0.0 if math.isinf(self.alpha) else 1 / (self.alpha - 1)


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
    ordered = _ascending(eigenvalues)
    index = hill_index(ordered.size, k_fraction)
    if ordered[index] <= 0:
        raise ValueError(f"the tail starts at eigenvalue {ordered[index]:g}: it must be positive")
    return _fit_at(ordered, index)


def hill_index(size: int, k_fraction: float = 0.5) -> int:
    """Ascending index of the Hill estimator's xmin: floor(n (1 - k_fraction)), n // 2 by default; at least two follow.

    >>> hill_index(101), hill_index(100, 0.1)
    (50, 90)
    """
    # 100 * (1 - 0.1) is 90.00000000000001 or 89.99999999999999 depending on the numbers: both mean 90.
    return max(0, min(math.floor(size * (1 - k_fraction) + 1e-9), size - 2))


def ks_fit(eigenvalues: npt.ArrayLike, *, window: tuple[float, float] | None = None) -> TailFit:
    """Power law whose xmin minimises the Kolmogorov-Smirnov distance of the tail (Clauset, Shalizi and Newman 2009).

    The scan over every distinct xmin is exact, but does not evaluate every distance in full: 64 points of each
    candidate's tail bound its distance from below, and candidates are evaluated in order of that bound until it
    exceeds the best distance found.

    >>> fit = ks_fit([1 / i**2 for i in range(1, 65)])
    >>> round(fit.alpha, 5)
    1.52459

    Args:
        eigenvalues: [n], any order. Zeros are left out: a power law has no mass there.
        window: admit only xmin in this closed interval.

    Raises:
        ValueError: if there are fewer than two positive eigenvalues, or none of them may be xmin.
    """
    ordered = _ascending(eigenvalues)
    zeros = int(np.searchsorted(ordered, 0.0, side="right"))
    positive = ordered[zeros:]
    if positive.size < 2:
        raise ValueError(f"a tail fit needs at least two positive eigenvalues, not {positive.size}")
    candidates = _distinct(positive, window)
    fit = _scan(positive, candidates)
    return replace(fit, xmin_index=fit.xmin_index + zeros)


def fix_finger_fit(eigenvalues: npt.ArrayLike, *, bound: Literal["linear", "legacy"] = "linear") -> TailFit:
    """`ks_fit` with xmin near the peak of the spectrum ("fix fingers", TempBalance, arXiv 2312.00359).

    The peak is the left edge of the fullest of 100 bins of log10(lambda), and xmin must lie in [0.95, 1.5] times the
    peak. With `bound="legacy"` the lower end is log10(0.95 peak), compared with linear eigenvalues: a mistake of
    the public code, offered so that numbers published with it can be reproduced.

    Raises:
        ValueError: as `ks_fit`.
    """
    ordered = _ascending(eigenvalues)
    positive = ordered[ordered > 0]
    if positive.size < 2:
        raise ValueError(f"a tail fit needs at least two positive eigenvalues, not {positive.size}")
    counts, edges = np.histogram(np.log10(positive), bins=FIX_FINGER_BINS)
    peak = 10.0 ** float(edges[int(np.argmax(counts))])
    low = 0.95 * peak if bound == "linear" else math.log10(0.95 * peak)
    return ks_fit(ordered, window=(low, 1.5 * peak))


def ks_distances(eigenvalues: npt.ArrayLike) -> tuple[Vector, Vector, Vector]:
    """The whole scan: (xmin, alpha, KS distance) for every admissible xmin, ascending; for plots and checks."""
    ordered = _ascending(eigenvalues)
    positive = ordered[ordered > 0]
    candidates = _distinct(positive, None)
    fits = [_fit_at(positive, int(index)) for index in candidates]
    return (
        np.array([fit.xmin for fit in fits]),
        np.array([fit.alpha for fit in fits]),
        np.array([fit.ks_distance for fit in fits]),
    )


def _ascending(eigenvalues: npt.ArrayLike) -> Vector:
    """A sorted float64 copy, checked."""
    ordered = np.sort(np.asarray(eigenvalues, dtype=np.float64).reshape(-1))
    if ordered.size < 2:
        raise ValueError(f"a tail fit needs at least two eigenvalues, not {ordered.size}")
    if not np.isfinite(ordered).all():
        raise ValueError("eigenvalues must be finite")
    return ordered


def _distinct(positive: Vector, window: tuple[float, float] | None) -> npt.NDArray[np.intp]:
    """Indices that may be xmin: the first of each run of equal values, below the maximum, inside the window."""
    first = np.ones(positive.size, dtype=bool)
    first[1:] = positive[1:] > positive[:-1]
    first &= positive < positive[-1]
    if window is not None:
        first &= (positive >= window[0]) & (positive <= window[1])
    candidates = np.flatnonzero(first)
    if candidates.size == 0:
        if positive[0] == positive[-1]:
            raise ValueError("constant spectrum: all eigenvalues are equal, alpha is infinite")
        raise ValueError("no eigenvalue lies in the window for xmin")
    return candidates


def _fit_at(ordered: Vector, index: int) -> TailFit:
    """The maximum-likelihood power law for a given xmin."""
    logs = np.log(ordered[index:]) - math.log(ordered[index])
    total = float(logs.sum())
    num_tail = logs.size
    alpha = 1 + num_tail / total if total > 0 else math.inf
    distance = _distance(logs, alpha) if total > 0 else 0.0
    return TailFit(alpha=alpha, xmin=float(ordered[index]), xmin_index=index, num_tail=num_tail, ks_distance=distance)


def _distance(logs: Vector, alpha: float) -> float:
    """KS distance of a tail given ln(lambda_j / xmin), ascending."""
    model = -np.expm1((1 - alpha) * logs)
    return float(np.abs(model - np.arange(logs.size) / logs.size).max())


def _scan(positive: Vector, candidates: npt.NDArray[np.intp]) -> TailFit:
    """The candidate with the smallest KS distance; the smallest xmin among equals."""
    size = positive.size
    logs = np.log(positive)
    logs -= logs[-1]  # centred at the top, so that the suffix sums cancel least
    suffix = np.cumsum(logs[::-1])[::-1]
    tails = size - candidates
    alphas = 1 + tails / (suffix[candidates] - tails * logs[candidates])

    # Any subset of a tail's points bounds its distance from below.
    steps = np.linspace(0.0, 1.0, min(_PROBES, size))
    offsets = np.floor(steps[None, :] * (tails[:, None] - 1)).astype(np.intp)
    gaps = logs[candidates[:, None] + offsets] - logs[candidates][:, None]
    model = -np.expm1((1 - alphas[:, None]) * gaps)
    bounds = np.abs(model - offsets / tails[:, None]).max(axis=1)

    best_distance, best = math.inf, -1
    for position in np.argsort(bounds, kind="stable"):
        if bounds[position] > best_distance:
            break
        index = int(candidates[position])
        distance = _distance(logs[index:] - logs[index], float(alphas[position]))
        if distance < best_distance or (distance == best_distance and index < best):
            best_distance, best = distance, index
    return _fit_at(positive, best)
