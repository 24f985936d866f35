"""Condition number: how unevenly a matrix stretches."""

from __future__ import annotations

import math

from esdtool.spectra.measure import Measure, MeasuredSpectrum, Number, Quantity

_REPORTED_ERROR = 1e-3
"""Largest relative error of the smallest eigenvalue at which the quotient is reported."""


def condition(measured: MeasuredSpectrum) -> dict[str, Number]:
    """Compute sigma_max / sigma_min; None where the smallest singular value is not told from zero."""
    spectrum = measured.spectrum
    smallest = float(spectrum.eigenvalues[0])
    if spectrum.relative_error(smallest) > _REPORTED_ERROR:
        return {"condition": None}
    return {"condition": math.sqrt(spectrum.lambda_max) / math.sqrt(smallest)}


MEASURE = Measure(
    quantities=(
        Quantity(
            name="condition",
            title="condition",
            formula="Condition number sigma_max / sigma_min; null where sigma_min is not told from zero",
            source="Golub and Van Loan, Matrix Computations, section 2.6",
        ),
    ),
    compute=condition,
)
