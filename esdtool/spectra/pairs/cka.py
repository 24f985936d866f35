"""Linear centred kernel alignment (CKA) of the weights: how far two matrices agree, up to rotations of one side.

Of the outputs, the kernels are A A^T and B B^T, and a rotation of the inputs changes nothing; of the inputs, they are
A^T A and B^T B. Weights are no samples of a data set, so nothing is centred: this is the form of the alignment before
centring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esdtool.spectra.measure import Number, Quantity
from esdtool.spectra.pair_measure import PairMeasure

if TYPE_CHECKING:
    from esdtool.spectra.matrix_pair import MatrixPair


def linear_cka(pair: MatrixPair) -> dict[str, Number]:
    """Align both kernels of both matrices; None where either matrix is all zero."""
    base, other, cross = pair.grams
    size = float(base.norm()) * float(other.norm())
    if size == 0:
        return {"cka_left": None, "cka_right": None}
    # <A^T A, B^T B> = ||A B^T||^2 and ||A^T A|| = ||A A^T||, so that no product is of the order of the long side.
    short, long = float((base * other).sum()) / size, float(cross.square().sum()) / size
    left, right = (short, long) if pair.rows_are_short else (long, short)
    return {"cka_left": min(left, 1.0), "cka_right": min(right, 1.0)}


_SOURCE = "Kornblith et al. 2019, arXiv 1905.00414, equation 3, without centring"

MEASURE = PairMeasure(
    quantities=(
        Quantity(
            name="cka_left",
            title="CKA left",
            formula="Linear CKA of the rows, ||A^T B||_F^2 / (||A^T A||_F ||B^T B||_F) with the base A and the other "
            "B: 1 if they differ by a rotation of the columns and a factor; null where either is all zero",
            source=_SOURCE,
        ),
        Quantity(
            name="cka_right",
            title="CKA right",
            formula="Linear CKA of the columns, ||A B^T||_F^2 / (||A A^T||_F ||B B^T||_F): 1 if they differ by a "
            "rotation of the rows and a factor",
            source=_SOURCE,
        ),
    ),
    compute=linear_cka,
)
