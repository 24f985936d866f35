"""The signal-to-noise score of Spectrum, which chooses the matrices to train, and what noise alone would score.

The method calls a singular value signal if it exceeds s (1 + sqrt beta), with s the interquartile range of all singular
values over 1.349 and beta the short side over the long one. That is not the edge of a random matrix's spectrum, so
noise scores too, and differently for each shape. The score of a random matrix of the shape stands beside it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from esdtool.spectra.measure import Measure, MeasuredSpectrum, Number, Quantity

if TYPE_CHECKING:
    from esdtool.spectra.tail import Vector

_NORMAL_RANGE = 1.349
"""Interquartile range of the normal distribution in standard deviations."""


def spectrum_snr(measured: MeasuredSpectrum) -> dict[str, Number]:
    """Score the singular values, and those of a random matrix of the same shape and mean square."""
    import numpy as np

    spectrum = measured.spectrum
    eigenvalues, (rows, columns) = spectrum.eigenvalues, measured.shape
    mean_square = float(eigenvalues.sum()) / (rows * columns * measured.num_matrices)
    noise = _noise_score(rows, columns, eigenvalues.size)
    scores = {
        "spectrum_snr": _score(np.sqrt(eigenvalues), min(rows, columns) / max(rows, columns)),
        "spectrum_snr_random": None if noise is None else noise / math.sqrt(mean_square),
    }
    # The score goes with 1 over the size of the weights, which float64 may have no number of.
    return {
        name: None if score is None else _rescaled(score, -spectrum.exponent // 2) for name, score in scores.items()
    }


@lru_cache(maxsize=64)
def _noise_score(rows: int, columns: int, count: int) -> float | None:
    """Score a random matrix with elements of variance 1."""
    import numpy as np

    from esdtool.spectra.marchenko_pastur import mp_quantiles

    return _score(np.sqrt(mp_quantiles(rows, columns, count)), min(rows, columns) / max(rows, columns))


def _score(singular: Vector, beta: float) -> float | None:
    """Score ascending singular values; None where all of them count as signal."""
    threshold = (_quantile(singular, 0.75) - _quantile(singular, 0.25)) / _NORMAL_RANGE * (1 + math.sqrt(beta))
    is_signal = singular > threshold
    noise = float(singular[~is_signal].sum())
    return float(singular[is_signal].sum()) / noise / float(singular[-1]) if noise > 0 else None


def _quantile(ascending: Vector, level: float) -> float:
    """Interpolate linearly between the two nearest values, as numpy does, which takes longer than all the rest."""
    place = (ascending.size - 1) * level
    below = math.floor(place)
    above = min(below + 1, ascending.size - 1)
    return float(ascending[below]) + (place - below) * float(ascending[above] - ascending[below])


def _rescaled(score: float, exponent: int) -> float | None:
    try:
        return math.ldexp(score, exponent)
    except OverflowError:
        return None


MEASURE = Measure(
    quantities=(
        Quantity(
            name="spectrum_snr",
            title="Spectrum SNR",
            formula="Sum of the singular values above t = s (1 + sqrt(short / long)), over the sum of the others, over "
            "sigma_max, with s the interquartile range of the singular values over 1.349; null where none is at or "
            "below t. Comparable within one shape only",
            source="Hartford et al., Spectrum, arXiv 2406.06623",
            unit="1 / weight",
        ),
        Quantity(
            name="spectrum_snr_random",
            title="SNR of noise",
            formula="The same score of the Marchenko-Pastur quantiles of a random matrix of this shape and mean square",
            source="Hartford et al., Spectrum, arXiv 2406.06623",
            unit="1 / weight",
        ),
    ),
    compute=spectrum_snr,
    of_full_rank=True,
)
