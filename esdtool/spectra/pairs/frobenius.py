"""The relative Frobenius distance of two versions of a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esdtool.spectra.measure import Number, Quantity
from esdtool.spectra.pair_measure import PairMeasure

if TYPE_CHECKING:
    from esdtool.spectra.matrix_pair import MatrixPair


def relative_distance(pair: MatrixPair) -> dict[str, Number]:
    """Divide the norm of the difference by that of the base; None where the base is all zero and the other is not."""
    difference, base = pair.norms
    return {"relative_distance": difference / base if base > 0 else None if difference > 0 else 0.0}


MEASURE = PairMeasure(
    quantities=(
        Quantity(
            name="relative_distance",
            title="distance",
            formula="Frobenius norm of the difference over that of the base; null where the base alone is all zero",
            source="Golub and Van Loan, Matrix Computations, section 2.3",
        ),
    ),
    compute=relative_distance,
    is_cheap=True,
)
