"""Decide whether a fit is reliable: compare its eigenvalues with the error of the path that computed them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from esdtool.spectra.estimator import Estimator
from esdtool.spectra.options import ScoreOptions, SpectrumPath
from esdtool.spectra.spectrum import Spectrum
from esdtool.spectra.tail import TailFit, Vector

_TOLERANCE: dict[SpectrumPath, float] = {"gram-float32": 1e-4, "gram-float64": 1e-7, "svd-float64": 1e-7}
"""Largest relative error of alpha for which a path is accepted while there is a better one."""

_LAST_TOLERANCE = 1e-3
"""Largest accepted relative error of alpha on the last path of the ladder."""

_SCAN_TOLERANCE = 1e-4
"""Largest relative error in float32 of the smallest eigenvalue that a scan may try."""

_PUBLIC_ZERO = 1e-5
"""Largest eigenvalue that the public code of AlphaDecay leaves out with its option `filter_zeros`."""

_CONSTANT = 1e-6
"""Mean ln(lambda / xmin) of a constant tail: float32 arithmetic leaves about this much on an orthogonal matrix."""


class UnresolvedError(Exception):
    """A fit rests on eigenvalues that the path does not resolve, and the ladder has a better path."""


class NoTailError(Exception):
    """A fit does not exist for this spectrum; the message is the module's status."""


def accepted_fit(estimator: Estimator, spectrum: Spectrum, options: ScoreOptions, *, last: bool) -> TailFit:
    """Fit a spectrum if its path resolves what the fit rests on.

    Args:
        estimator: the way to fit.
        spectrum: all eigenvalues by one path.
        options: settings of the fit.
        last: whether the ladder has no better path.

    Raises:
        UnresolvedError: if a better path is needed and there is one.
        NoTailError: if there is no tail, or no path resolves it.
    """
    if options.filter_zeros:
        spectrum = _without_zeros(spectrum)
    if estimator.xmin_index is None:
        return _fit_by_scan(estimator, spectrum, options, last=last)
    return _fit_at_index(estimator, spectrum, options, estimator.xmin_index(spectrum.eigenvalues.size, options), last)


def _without_zeros(spectrum: Spectrum) -> Spectrum:
    """Drop the eigenvalues that the public code of AlphaDecay takes for zeros, unless all of them are."""
    eigenvalues = spectrum.eigenvalues
    with np.errstate(divide="ignore"):
        # By logarithms, since float64 may have no number of the eigenvalues' true size.
        kept = eigenvalues[np.log2(eigenvalues) + spectrum.exponent > math.log2(_PUBLIC_ZERO)]
    return replace(spectrum, eigenvalues=kept) if kept.size else spectrum


def _fit_at_index(estimator: Estimator, spectrum: Spectrum, options: ScoreOptions, index: int, last: bool) -> TailFit:
    """Fit with the size of the tail fixed, if the path resolves the eigenvalue at xmin."""
    eigenvalues = spectrum.eigenvalues
    xmin = float(eigenvalues[index])
    if xmin <= spectrum.resolution and spectrum.resolution > spectrum.storage_floor and spectrum.path != "svd-float64":
        if not last:
            raise UnresolvedError
        raise NoTailError(_too_coarse(spectrum.path))
    floor = max(spectrum.storage_floor, spectrum.resolution)
    if xmin <= floor:
        raise NoTailError(
            "rank-deficient: the tail starts at the rounding floor of the stored weights "
            f"({int((eigenvalues > floor).sum())} of {eigenvalues.size} eigenvalues are above it)"
        )
    return _checked(_fit(estimator, eigenvalues, options), spectrum, last=last)


def _fit_by_scan(estimator: Estimator, spectrum: Spectrum, options: ScoreOptions, *, last: bool) -> TailFit:
    """Fit with xmin anywhere among the eigenvalues above the floor."""
    smallest = float(spectrum.eigenvalues[0])
    if spectrum.path == "gram-float32" and not last and spectrum.relative_error(smallest) > _SCAN_TOLERANCE:
        # The scan would try eigenvalues that float32 does not resolve, and could neither take nor rule them out.
        raise UnresolvedError
    usable = np.where(spectrum.eigenvalues > spectrum.storage_floor, spectrum.eigenvalues, 0.0)
    return _checked(_fit(estimator, usable, options), spectrum, last=last)


def _fit(estimator: Estimator, eigenvalues: Vector, options: ScoreOptions) -> TailFit:
    try:
        return estimator.fit(eigenvalues, options)
    except ValueError as error:
        raise NoTailError(str(error)) from error


def _checked(fit: TailFit, spectrum: Spectrum, *, last: bool) -> TailFit:
    """Return the fit if its alpha exists and is known well enough."""
    if fit.mean_log_spread <= _CONSTANT:
        raise NoTailError("constant spectrum: the eigenvalues in the tail are equal up to rounding, alpha is infinite")
    error = spectrum.relative_error(fit.xmin) * max(1.0, fit.sensitivity)
    if error > _TOLERANCE[spectrum.path]:
        if not last:
            raise UnresolvedError
        if error > _LAST_TOLERANCE:
            raise NoTailError(_too_coarse(spectrum.path))
    return fit


def _too_coarse(path: SpectrumPath) -> str:
    """Say that a path does not resolve the tail, and what would, if anything does."""
    if path == "svd-float64":
        return "the tail starts below the resolution of float64, on every path"
    return "the tail starts below the resolution of the Gram path; allow --spectrum auto or svd"
