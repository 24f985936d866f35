"""The Marchenko-Pastur bulk of a trained matrix: the part of its spectrum that noise explains, and what exceeds it.

The variance of the noise comes from the lower half of the eigenvalues alone, which spikes and a heavy tail do not
touch: sigma^2 is their sum over the sum of the same quantiles of the Marchenko-Pastur law for variance 1. The variance
of all elements, which signal raises, would hide spikes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from esdtool.spectra.measure import Measure, MeasuredSpectrum, Number, Quantity
from esdtool.spectra.tracy_widom import noise_ceiling

if TYPE_CHECKING:
    from esdtool.spectra.slq import SlqEstimate
    from esdtool.spectra.tail import Vector

_NAMES = ("mp_sigma", "mp_bulk_min", "mp_bulk_max", "num_spikes", "mp_softrank", "mp_fit_distance")


def mp_bulk(measured: MeasuredSpectrum) -> dict[str, Number]:
    """Fit the bulk, and compare the spectrum with it; None where the lower half is zero or rounding."""
    from esdtool.spectra.marchenko_pastur import mp_edges, mp_quantiles

    spectrum = measured.spectrum
    eigenvalues = spectrum.eigenvalues
    lower = eigenvalues[: math.ceil(eigenvalues.size / 2)]
    if lower[-1] <= max(spectrum.storage_floor, spectrum.resolution):
        return dict.fromkeys(_NAMES)
    variance = float(lower.sum()) / float(mp_quantiles(*measured.shape, eigenvalues.size)[: lower.size].sum())
    low, high = mp_edges(*measured.shape)
    bulk = eigenvalues[eigenvalues <= variance * noise_ceiling(*measured.shape)]
    return {
        "mp_sigma": spectrum.unscaled(math.sqrt(variance), power=2),
        "mp_bulk_min": spectrum.unscaled(variance * low),
        "mp_bulk_max": spectrum.unscaled(variance * high),
        "num_spikes": eigenvalues.size - bulk.size,
        "mp_softrank": variance * high / spectrum.lambda_max,
        "mp_fit_distance": _distance(bulk / variance, measured.shape) if bulk.size else None,
    }


def estimated_mp_bulk(estimate: SlqEstimate, shape: tuple[int, int]) -> dict[str, Number]:
    """Compare an estimate with the bulk whose median it has; spikes are counted if all above the bulk are known."""
    import numpy as np

    from esdtool.spectra.marchenko_pastur import mp_edges, mp_quantiles

    count = min(shape)
    variance = estimate.lambda_median / float(np.median(mp_quantiles(*shape, count)))
    low, high = mp_edges(*shape)
    ceiling = variance * noise_ceiling(*shape)
    counted = estimate.top.size > 0 and float(estimate.top[0]) <= ceiling
    return {
        "mp_sigma": math.sqrt(variance),
        "mp_bulk_min": variance * low,
        "mp_bulk_max": variance * high,
        "num_spikes": int((estimate.top > ceiling).sum()) if counted else None,
        "mp_softrank": variance * high / estimate.lambda_max,
    }


def _distance(bulk: Vector, shape: tuple[int, int]) -> float:
    """Return the Kolmogorov-Smirnov distance of ascending eigenvalues from the law for variance 1."""
    import numpy as np

    from esdtool.spectra.marchenko_pastur import mp_cumulative

    model = mp_cumulative(bulk, *shape)
    steps = np.arange(bulk.size + 1) / bulk.size
    return float(max(np.abs(model - steps[:-1]).max(), np.abs(model - steps[1:]).max()))


_LAW = "Marchenko and Pastur 1967"

MEASURE = Measure(
    quantities=(
        Quantity(
            name="mp_sigma",
            title="bulk sigma",
            formula="Standard deviation of the elements of the random matrix of this shape whose eigenvalues match the "
            "lower half: sqrt(sum lambda_i / sum q_i) over i <= n / 2, with q_i the Marchenko-Pastur quantiles for "
            "variance 1; null where the lower half is zero or rounding, as the other numbers of the bulk",
            source=_LAW,
            unit="weight",
        ),
        Quantity(
            name="mp_bulk_min",
            title="bulk from",
            formula="Lower edge of the bulk, mp_sigma^2 (sqrt long - sqrt short)^2 with the sides of the matrix",
            source=_LAW,
            unit="weight^2",
        ),
        Quantity(
            name="mp_bulk_max",
            title="bulk to",
            formula="Upper edge of the bulk, mp_sigma^2 (sqrt long + sqrt short)^2",
            source=_LAW,
            unit="weight^2",
        ),
        Quantity(
            name="num_spikes",
            title="spikes",
            formula="Eigenvalues above the bulk by more than its largest eigenvalue reaches once in a thousand random "
            "matrices (Tracy-Widom)",
            source="Johnstone 2001, theorem 1.1",
            whole=True,
        ),
        Quantity(
            name="mp_softrank",
            title="MP soft rank",
            formula="mp_bulk_max / lambda_max: near 1 for noise, near 0 for strong signal",
            source="Martin and Mahoney, arXiv 1810.01075",
        ),
        Quantity(
            name="mp_fit_distance",
            title="bulk KS",
            formula="Kolmogorov-Smirnov distance of the eigenvalues that are no spikes from the Marchenko-Pastur law "
            "of the bulk: about 1 / n for noise, near 1 for a bulk of another form",
            source="Kolmogorov 1933",
        ),
    ),
    compute=mp_bulk,
    estimate=estimated_mp_bulk,
    of_full_rank=True,
)
