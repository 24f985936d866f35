"""`bounded`: a power law that ends at the largest eigenvalue, with the xmin of the smallest KS distance.

A pure power law goes on for ever. Where a spectrum ends at a hard edge (a matrix of low rank, a bulk without spikes,
clipped weights), its alpha comes out too large, because large values are missing that the law expects. The bounded law
has the density

    p(lambda) = b xmin^b lambda^-alpha / (1 - (xmin / xmax)^b),    b = alpha - 1,    xmin <= lambda <= xmax,

for any alpha (Aban, Meerschaert and Panorska 2006). Its xmax is the largest eigenvalue, which is the maximum-likelihood
estimate, and comes so close to the edge (as 1 / k) that alpha's error does not notice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from esdtool.spectra.estimator import Estimator
from esdtool.spectra.estimators.ks import log_sums, nearest, xmin_candidates
from esdtool.spectra.tail import ModifiedLaw, TailFit, Vector, ascending

_FEWEST = 3
"""Eigenvalues of a tail: with both ends only, alpha would be 1 whatever they are."""

_SERIES = 0.05
"""|z| below which differences of nearly equal numbers are taken from their series."""

_MOST_STEPS = 200


def bounded_fit(eigenvalues: npt.ArrayLike) -> TailFit:
    """Power law between xmin and the largest eigenvalue, whose xmin minimises the KS distance of the tail.

    >>> fit = bounded_fit([1 / i**2 for i in range(1, 65)])
    >>> round(fit.alpha, 4), fit.law.xmax
    (1.4869, 1.0)

    Args:
        eigenvalues: [n], any order. Zeros are left out: a power law has no mass there.

    Raises:
        ValueError: if there are fewer than three positive eigenvalues, all are equal, or their density falls nowhere.
    """
    ordered = ascending(eigenvalues)
    zeros = int(np.searchsorted(ordered, 0.0, side="right"))
    positive = ordered[zeros:]
    if positive.size < _FEWEST:
        raise ValueError(f"a bounded tail needs at least {_FEWEST} positive eigenvalues, not {positive.size}")
    logs = np.log(positive)
    logs -= logs[-1]
    candidates = xmin_candidates(positive)
    candidates = candidates[positive.size - candidates >= _FEWEST]
    tails, sums = log_sums(logs, candidates)
    lengths = -logs[candidates]
    exponents = solve_exponent(sums / (tails * lengths)) / lengths
    falling = exponents > -1
    if not falling.any():
        raise ValueError("no tail: the density of the eigenvalues rises up to the largest one, on every range")
    candidates, exponents, lengths = candidates[falling], exponents[falling], lengths[falling]
    best, distance = nearest(
        logs,
        candidates,
        lambda positions, gaps: bounded_cumulative(gaps, exponents[positions], lengths[positions]),
    )
    index, exponent, length = int(candidates[best]), float(exponents[best]), float(lengths[best])
    tail = logs[index:]
    return TailFit(
        alpha=1 + exponent,
        xmin=float(positive[index]),
        xmin_index=index + zeros,
        num_tail=tail.size,
        ks_distance=distance,
        law=ModifiedLaw(
            log_spread=float((tail - tail[0]).mean()),
            information=length**2 * float(_variance(np.array(exponent * length))),
            xmax=float(positive[-1]),
        ),
    )


def bounded_cumulative(gaps: Vector, exponents: Vector, lengths: Vector) -> Vector:
    """Compute the distribution function (1 - (xmin / lambda)^b) / (1 - (xmin / xmax)^b).

    Args:
        gaps: ln(lambda / xmin).
        exponents: b = alpha - 1, of a shape that broadcasts with it, as the next.
        lengths: ln(xmax / xmin).
    """
    size = exponents * lengths
    flat = np.abs(size) < 1e-9
    safe = np.where(flat, 1.0, exponents)
    curved: Vector = np.expm1(-safe * gaps) / np.expm1(-safe * lengths)
    return np.where(flat, gaps / lengths, curved)


def solve_exponent(means: Vector) -> Vector:
    """Find z with 1 / z - 1 / (e^z - 1) = r, which the likelihood's maximum satisfies.

    z is b ln(xmax / xmin), and r the mean of ln(lambda / xmin) over ln(xmax / xmin).

    Args:
        means: [m] r, each in (0, 1).
    """
    # z(1 - r) = -z(r). For z > 0 the left side falls and is convex: from the left Newton's steps never overshoot.
    small = np.minimum(means, 1 - means)
    size = 12 * (0.5 - small)
    for _ in range(_MOST_STEPS):
        step = (_mean(size) - small) / _variance(size)
        size = size + step
        if np.all(np.abs(step) <= 1e-13 * (1 + size)):
            break
    return np.where(means <= 0.5, size, -size)


def _mean(size: Vector) -> Vector:
    """Compute 1 / z - 1 / (e^z - 1): the mean of t with density proportional to e^(-z t) on [0, 1]."""
    near = np.abs(size) < _SERIES
    safe = np.where(near, 1.0, size)
    with np.errstate(over="ignore"):
        exact = 1 / safe - 1 / np.expm1(safe)
    return np.where(near, 0.5 - size / 12 + size**3 / 720 - size**5 / 30240, exact)


def _variance(size: Vector) -> Vector:
    """Compute 1 / z^2 - 1 / (2 sinh(z / 2))^2: the variance of the same t."""
    near = np.abs(size) < _SERIES
    safe = np.where(near, 1.0, size)
    with np.errstate(over="ignore"):
        exact = 1 / safe**2 - 1 / (2 * np.sinh(safe / 2)) ** 2
    return np.where(near, 1 / 12 - size**2 / 240 + size**4 / 6048 - size**6 / 172800, exact)


ESTIMATOR = Estimator(fit=lambda eigenvalues, _: bounded_fit(eigenvalues))
