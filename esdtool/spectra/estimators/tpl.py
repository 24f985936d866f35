"""`tpl`: a power law truncated by an exponential, p(lambda) ~ lambda^-alpha exp(-Lambda lambda), by `powerlaw`.

The package fits both parameters by maximum likelihood (Clauset, Shalizi and Newman 2009, table 2). A fit takes a tenth
of a second and more, so only tails of 10, 20, ... 100 % of the eigenvalues are tried; the one with the smallest
Kolmogorov-Smirnov distance is taken. The law is an exponential family in (ln lambda, lambda), so the information about
alpha and Lambda is the covariance of the two under the law, and what alpha has of it when Lambda is unknown as well is

    i = Var(ln lambda) - Cov(ln lambda, lambda)^2 / Var(lambda).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from esdtool.spectra.estimator import Estimator
from esdtool.spectra.laws import compare_laws, quiet_package
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.tail import ModifiedLaw, TailFit, Vector, ascending

_FEWEST = 8
"""Eigenvalues of a tail that two parameters are fitted to."""

_SHARES = 10
"""Tails that are tried: all the eigenvalues, and shares of them."""

_LEAST_ALPHA = 1e-3
"""Alpha below which the law is an exponential one: a Marchenko-Pastur bulk is of that kind."""

_CUT = 60.0
"""-ln of the density, over its largest, from which on it counts as zero."""

_AT_MAXIMUM = 0.02
"""Largest score statistic at which a fit counts as the likelihood's maximum; that is 0.14 standard errors away."""


def tpl_fit(eigenvalues: npt.ArrayLike, *, compare: bool = True) -> TailFit:
    """Fit the truncated power law, and compare it with other laws on the same tail.

    Args:
        eigenvalues: [n], any order, not negative. Zeros are left out.
        compare: whether other laws are compared.

    Raises:
        ValueError: if there are fewer than eight positive eigenvalues, all are equal, or alpha is 0 for every tail.
    """
    ordered = ascending(eigenvalues)
    positive = ordered[ordered > 0]
    if positive.size < _FEWEST:
        raise ValueError(f"a truncated power law needs at least {_FEWEST} positive eigenvalues, not {positive.size}")
    if positive[-1] <= positive[0] * (1 + 1e-6):
        raise ValueError("constant spectrum: all eigenvalues are equal, alpha is infinite")
    with quiet_package() as powerlaw:
        fits = {index: _fit_from(powerlaw, positive, index) for index in _starts(positive)}
        known = {index: fit for index, fit in fits.items() if _has_power_law(fit)}
        if not known:
            raise ValueError("no power law: every tail falls exponentially from its beginning (alpha is 0)")
        index = min(known, key=lambda start: known[start].truncated_power_law.D)
        alpha, rate, distance = _numbers(known[index])
        comparisons, best = compare_laws(known[index]) if compare else (None, None)
    xmin = float(positive[index])
    scaled = positive[index:] / xmin
    return TailFit(
        alpha=alpha,
        xmin=xmin,
        xmin_index=index + ordered.size - positive.size,
        num_tail=scaled.size,
        ks_distance=distance,
        comparisons=comparisons,
        best_law=best,
        law=ModifiedLaw(
            log_spread=float(np.log(scaled).mean()),
            information=_information(scaled, alpha, rate),
            truncation=rate / xmin,
        ),
    )


def tpl_moments(alpha: float, rate: float) -> tuple[float, Vector, npt.NDArray[np.float64]]:
    """Integrate the truncated power law y^-alpha exp(-rate (y - 1)) over y >= 1.

    Args:
        alpha: exponent.
        rate: Lambda xmin, above 0.

    Returns:
        The integral, the means of (ln y, y) [2], and their covariance [2, 2].
    """
    from scipy.integrate import quad_vec

    # Beyond this y the factor exp(-rate (y - 1)) has made nothing of the density.
    end = math.log1p((_CUT + 20 * max(0.0, 1 - alpha)) / rate)

    def moments(log: float) -> Vector:
        y = math.exp(log)
        weight = math.exp((1 - alpha) * log - rate * (y - 1))
        return weight * np.array([1.0, log, y, log * log, log * y, y * y])

    found = quad_vec(moments, 0.0, end, epsrel=1e-10, norm="max")[0]
    total = float(found[0])
    mean_log, mean, log_squared, product, squared = found[1:] / total
    means = np.array([mean_log, mean])
    return total, means, np.array([[log_squared, product], [product, squared]]) - np.outer(means, means)


def _starts(positive: Vector) -> list[int]:
    """Return the indices of xmin that are tried: the first of the values that are equal to it."""
    sizes = [max(_FEWEST, math.ceil(positive.size * share / _SHARES)) for share in range(1, _SHARES + 1)]
    starts = {int(np.searchsorted(positive, positive[positive.size - size])) for size in sizes}
    return sorted(start for start in starts if positive[-1] > positive[start] * (1 + 1e-6))


def _fit_from(powerlaw: Any, positive: Vector, index: int) -> Any:
    """Give the package the tail over its xmin, since its optimisers have absolute tolerances."""
    fit = powerlaw.Fit(
        positive[index:] / positive[index],
        xmin=1.0,
        verbose=False,
        # Its default range of alpha ends at 3.
        parameter_ranges={"alpha": [0, None]},
    )
    _ = fit.truncated_power_law
    return fit


def _numbers(fit: Any) -> tuple[float, float, float]:
    """Return alpha, Lambda xmin and the KS distance."""
    law = fit.truncated_power_law
    return float(law.alpha), float(law.Lambda), float(law.D)


def _has_power_law(fit: Any) -> bool:
    """Tell whether the fit gave numbers, and alpha is not at the end of its range."""
    return bool(np.isfinite(_numbers(fit)).all()) and _numbers(fit)[0] > _LEAST_ALPHA


def _information(scaled: Vector, alpha: float, rate: float) -> float | None:
    """Return the information of one eigenvalue about alpha; None unless the likelihood has its maximum there.

    At the edge of the parameters, Lambda = 0, the likelihood has a slope, and errors by its curvature are not those of
    alpha.
    """
    if rate <= 0:
        return None
    try:
        _, means, covariance = tpl_moments(alpha, rate)
    except OverflowError:
        return None
    slope = means - [np.log(scaled).mean(), scaled.mean()]
    determinant = float(np.linalg.det(covariance))
    if not determinant > 0 or scaled.size * float(slope @ np.linalg.solve(covariance, slope)) > _AT_MAXIMUM:
        return None
    return determinant / float(covariance[1, 1])


def _fit(eigenvalues: Vector, options: ScoreOptions) -> TailFit:
    del options
    return tpl_fit(eigenvalues)


def _null_fit(eigenvalues: Vector, options: ScoreOptions) -> TailFit:
    """Fit the untrained null, without the comparison of laws."""
    del options
    return tpl_fit(eigenvalues, compare=False)


ESTIMATOR = Estimator(fit=_fit, null_fit=_null_fit)
