"""Compute the curves of a spectrum: its histogram on a logarithmic axis, the fitted tail and the untrained null.

The one source of numbers for the figures, the HTML report and the terminal's sparklines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esdtool.analysis.module_record import ModuleResult, TailResult
from esdtool.spectra.estimators.tpl import tpl_moments
from esdtool.spectra.marchenko_pastur import mp_density

Vector = npt.NDArray[np.float64]

_MIN_BINS, _MAX_BINS = 10, 60
_USUAL = 100.0
"""Decades to either side of 1 in which a spectrum is drawn as it is."""
_DECADES = 9.0
"""The axis reaches so far below the largest eigenvalue; what is smaller is rounding, and counted apart."""


@dataclass(frozen=True, kw_only=True)
class EsdHistogram:
    """An ESD in bins of equal width on a logarithmic axis."""

    edges: Vector
    """[bins + 1] eigenvalues, ascending, positive."""
    counts: npt.NDArray[np.int64]
    """[bins] eigenvalues in each bin."""
    total: int
    """Eigenvalues of the module, those below the first edge included."""

    @property
    def density(self) -> Vector:
        """[bins] fraction of all eigenvalues per unit of eigenvalue: the empirical spectral density."""
        density: Vector = self.counts / (self.total * np.diff(self.edges))
        return density

    @property
    def num_below(self) -> int:
        """Eigenvalues left of the axis: zeros, and what is too small to be told from them."""
        return self.total - int(self.counts.sum())


def esd_histogram(eigenvalues: npt.ArrayLike, *, bins: int | None = None) -> EsdHistogram:
    """Count eigenvalues in logarithmic bins.

    >>> histogram = esd_histogram([0.0, 1.0, 2.0, 4.0, 8.0], bins=3)
    >>> histogram.edges.round(6).tolist(), histogram.counts.tolist(), histogram.num_below
    ([1.0, 2.0, 4.0, 8.0], [1, 1, 2], 1)

    Args:
        eigenvalues: [n], n >= 1, any order, not negative, at least one positive.
        bins: number of bins; by default about 1.5 sqrt(n), 10 to 60.
    """
    values = np.sort(np.asarray(eigenvalues, dtype=np.float64).reshape(-1))
    largest = float(values[-1])
    if not largest > 0:
        raise ValueError("an ESD on a logarithmic axis needs a positive eigenvalue")
    shown = values[values > largest * 10**-_DECADES]
    bins = bins or min(max(round(1.5 * math.sqrt(shown.size)), _MIN_BINS), _MAX_BINS)
    low = float(shown[0])
    if low == largest:  # one value, or all equal: a bin around it
        low, largest = low / 1.1, largest * 1.1
    edges = np.geomspace(low, largest, bins + 1)
    edges[0], edges[-1] = low, largest  # exactly: the ends must not fall out of their bins
    counts, _ = np.histogram(shown, edges)
    return EsdHistogram(edges=edges, counts=counts.astype(np.int64), total=values.size)


def in_drawable_units(module: ModuleResult, eigenvalues: Vector) -> tuple[ModuleResult, Vector, int]:
    """Divide a spectrum and its fits by a power of ten, where densities and their products would leave float64.

    Returns:
        (module, eigenvalues, exponent of ten); the exponent is 0, and all is as it was, for spectra of usual scale.
    """
    largest = float(eigenvalues.max())
    if not largest > 0 or 10**-_USUAL < largest < 10**_USUAL:
        return module, eigenvalues, 0
    exponent = math.floor(math.log10(largest))
    unit = 10.0**exponent
    fits = {
        name: None if fit is None or fit.xmin is None else fit.model_copy(update=_over(fit, unit))
        for name, fit in module.fits.items()
    }
    # It is only squared, for the null: the half power of an odd exponent is no matter.
    sigma = module.measure("mp_sigma")
    scaled = None if sigma is None else sigma / math.sqrt(unit)
    return module.model_copy(update={"fits": fits, "mp_sigma": scaled}), eigenvalues / unit, exponent


def tail_density(eigenvalues: Vector, fit: TailResult, total: int) -> Vector:
    """The fitted law on the scale of the ESD: (num_tail / total) h / xmin (lambda / xmin)^-alpha.

    The height h is `height_at_xmin`. A truncated power law has the factor exp(-Lambda (lambda - xmin)) as well.

    Args:
        eigenvalues: [k], at or above xmin.
        fit: the tail, from `drawn_fit`.
        total: eigenvalues of the module.
    """
    assert fit.xmin is not None
    scale = fit.num_tail / total * height_at_xmin(fit) / fit.xmin
    density: Vector = scale * (eigenvalues / fit.xmin) ** -fit.alpha
    return (
        density
        if fit.truncation_lambda is None
        else density * np.exp(-fit.truncation_lambda * (eigenvalues - fit.xmin))
    )


def height_at_xmin(fit: TailResult) -> float:
    """Compute the density of a law at xmin, times xmin: alpha - 1 for a power law that has no end and no bend."""
    assert fit.xmin is not None
    exponent = fit.alpha - 1
    if fit.truncation_lambda is not None:
        return 1 / tpl_moments(fit.alpha, fit.truncation_lambda * fit.xmin)[0]
    if fit.xmax is not None:
        length = math.log(fit.xmax / fit.xmin)
        return 1 / length if abs(exponent * length) < 1e-9 else exponent / -math.expm1(-exponent * length)
    return exponent


def _over(fit: TailResult, unit: float) -> dict[str, float | None]:
    """Return the numbers of a fit that have a scale, over a unit."""
    assert fit.xmin is not None
    return {
        "xmin": fit.xmin / unit,
        "xmax": None if fit.xmax is None else fit.xmax / unit,
        "truncation_lambda": None if fit.truncation_lambda is None else fit.truncation_lambda * unit,
    }


def drawn_fit(module: ModuleResult) -> tuple[str, TailResult] | None:
    """Return the first estimator's name and tail whose xmin is an eigenvalue of the module; None without one.

    That of `farms` is an eigenvalue of the module's windows, on another scale.
    """
    return next(
        (
            (name, fit)
            for name, fit in module.fits.items()
            if fit is not None and fit.xmin is not None and name != "farms"
        ),
        None,
    )


def null_density(eigenvalues: Vector, module: ModuleResult) -> Vector | None:
    """Compute the density of a random matrix of the module's shape, with the variance that matches its bulk.

    Returns:
        [k], 0 outside its support; None where there is no such null: low-rank updates, unscored modules, and modules
        whose lower half of the eigenvalues is zero.
    """
    sigma = module.measure("mp_sigma")
    if sigma is None or module.rank is not None:
        return None
    rows, columns = module.shape[0], module.shape[1]
    return mp_density(eigenvalues, rows, columns, mean_square=sigma * sigma)
