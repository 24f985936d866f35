"""`ks`: the xmin with the smallest Kolmogorov-Smirnov distance (Clauset, Shalizi and Newman 2009)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from esdtool.spectra.estimator import Estimator
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.tail import TailFit, Vector, ascending, fit_at

Indices = npt.NDArray[np.intp]

Cumulative = Callable[[Any, Vector], Vector]

_POINTS = 24
"""Points of each candidate's tail from which a lower bound of its distance is computed."""


def ks_fit(eigenvalues: npt.ArrayLike, *, window: tuple[float, float] | None = None) -> TailFit:
    """Power law whose xmin minimises the Kolmogorov-Smirnov distance of the tail (Clauset, Shalizi and Newman 2009).

    The scan over every distinct xmin is exact, but does not evaluate every distance in full: 24 points of each
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
    ordered = ascending(eigenvalues)
    zeros = int(np.searchsorted(ordered, 0.0, side="right"))
    positive = ordered[zeros:]
    if positive.size < 2:
        raise ValueError(f"a tail fit needs at least two positive eigenvalues, not {positive.size}")
    candidates = xmin_candidates(positive, window)
    fit = _scan(positive, candidates)
    return replace(fit, xmin_index=fit.xmin_index + zeros)


def ks_distances(eigenvalues: npt.ArrayLike) -> tuple[Vector, Vector, Vector]:
    """Compute the whole scan, for plots and checks.

    Args:
        eigenvalues: [n], any order.

    Returns:
        xmin, alpha and KS distance of every admissible xmin, ascending; [k] each.

    Raises:
        ValueError: as `ks_fit` does.
    """
    ordered = ascending(eigenvalues)
    positive = ordered[ordered > 0]
    candidates = xmin_candidates(positive)
    fits = [fit_at(positive, int(index)) for index in candidates]
    return (
        np.array([fit.xmin for fit in fits]),
        np.array([fit.alpha for fit in fits]),
        np.array([fit.ks_distance for fit in fits]),
    )


def xmin_candidates(positive: Vector, window: tuple[float, float] | None = None) -> Indices:
    """Return the indices [m] that may be xmin: the first of each run of equal values, below the maximum.

    Args:
        positive: [n] ascending, above 0.
        window: admit only xmin in this closed interval.

    Raises:
        ValueError: if there is none.
    """
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


def log_sums(logs: Vector, candidates: Indices) -> tuple[Indices, Vector]:
    """Return the size of each candidate's tail, and the sum of ln(lambda_j / xmin) over it, [m] each.

    Args:
        logs: [n] logarithms of the eigenvalues over the largest, ascending, so that the suffix sums cancel least.
        candidates: [m] indices of xmin.
    """
    tails = logs.size - candidates
    return tails, np.cumsum(logs[::-1])[::-1][candidates] - tails * logs[candidates]


def nearest(logs: Vector, candidates: Indices, cumulative: Cumulative) -> tuple[int, float]:
    """Find the candidate whose law has the smallest KS distance, the smallest xmin among equals.

    Args:
        logs: [n] logarithms of the eigenvalues, ascending.
        candidates: [m] indices of xmin.
        cumulative: gives the distribution function of candidates' laws, of their positions among `candidates` and of
            ln(lambda / xmin).

    Returns:
        Its position among the candidates, and the distance.
    """
    tails = logs.size - candidates
    # Any subset of a tail's points bounds its distance from below.
    steps = np.linspace(0.0, 1.0, min(_POINTS, logs.size))
    offsets = np.floor(steps[None, :] * (tails[:, None] - 1)).astype(np.intp)
    gaps = logs[candidates[:, None] + offsets] - logs[candidates][:, None]
    model = cumulative(np.arange(candidates.size)[:, None], gaps)
    bounds = np.abs(model - offsets / tails[:, None]).max(axis=1)

    best_distance, best = math.inf, -1
    for position in np.argsort(bounds, kind="stable"):
        if bounds[position] > best_distance:
            break
        gap = logs[candidates[position] :] - logs[candidates[position]]
        distance = float(np.abs(cumulative(position, gap) - np.arange(gap.size) / gap.size).max())
        if distance < best_distance or (distance == best_distance and position < best):
            best_distance, best = distance, int(position)
    return best, best_distance


def _scan(positive: Vector, candidates: Indices) -> TailFit:
    """Fit the candidate with the smallest KS distance."""
    logs = np.log(positive)
    logs -= logs[-1]
    tails, sums = log_sums(logs, candidates)
    alphas = 1 + tails / sums
    best, _ = nearest(logs, candidates, lambda positions, gaps: -np.expm1((1 - alphas[positions]) * gaps))
    return fit_at(positive, int(candidates[best]))


def _fit(eigenvalues: Vector, options: ScoreOptions) -> TailFit:
    del options
    return ks_fit(eigenvalues)


ESTIMATOR = Estimator(fit=_fit)
