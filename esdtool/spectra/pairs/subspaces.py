"""The overlap of the spaces that the first k singular vectors of two matrices span, and their principal angles.

The cosines of the principal angles are the singular values of U_A^T U_B, with the k vectors of either matrix in the
columns (Bjorck and Golub 1973). The overlap is the mean of their squares, ||U_A^T U_B||_F^2 / k; two random spaces of
dimension k in n dimensions have k / n. Neither depends on the bases of the spaces.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from esdtool.spectra.measure import Number, Quantity
from esdtool.spectra.pair_measure import PairMeasure

if TYPE_CHECKING:
    from esdtool.spectra.matrix_pair import MatrixPair

_COUNTS = (1, 4, 16)

_EFFECTIVE = "effective"


def subspaces(pair: MatrixPair) -> dict[str, Number]:
    """Compare the spaces of the first 1, 4, 16 and (effective rank of the base) vectors of both sides.

    None where a matrix has fewer resolved singular values, and where the next one is as large: then the space is any.
    """
    import torch

    effective = pair.base_vectors.effective_rank
    values: dict[str, Number] = {"overlap_rank": effective}
    for label, count in (*((str(count), count) for count in _COUNTS), (_EFFECTIVE, effective)):
        is_definite = pair.base_vectors.is_separate(count) and pair.other_vectors.is_separate(count)
        for side in ("left", "right"):
            overlap = angle = None
            if is_definite:
                products = pair.products(left=side == "left", of_base=count, of_other=count)
                overlap = min(1.0, float(products.square().sum()) / count)
                smallest = float(torch.linalg.svdvals(products)[-1])
                angle = math.degrees(math.acos(min(1.0, smallest)))
            values |= {f"overlap_{side}_{label}": overlap, f"angle_{side}_{label}": angle}
    return values


def _quantities() -> tuple[Quantity, ...]:
    found = []
    for label in (*map(str, _COUNTS), _EFFECTIVE):
        k = "k" if label == _EFFECTIVE else label
        many = "overlap_rank = k" if label == _EFFECTIVE else k
        for side in ("left", "right"):
            what = f"the spaces of the first {many} {side} singular vectors"
            found.append(
                Quantity(
                    name=f"overlap_{side}_{label}",
                    title=f"overlap {label} {side}",
                    formula=f"Overlap of {what}, ||U_A^T U_B||_F^2 / {k}: 1 if they are the same, 0 if orthogonal; "
                    "null where a matrix has fewer singular values, or two equal ones at the border of the space",
                    source=_SOURCE,
                )
            )
            found.append(
                Quantity(
                    name=f"angle_{side}_{label}",
                    title=f"angle {label} {side}",
                    formula=f"Largest principal angle between {what}",
                    source=_SOURCE,
                    unit="degrees",
                )
            )
    rank = Quantity(
        name="overlap_rank",
        title="overlap at",
        formula="Effective rank of the base, rounded: the number k of singular vectors of the last four numbers",
        source="Roy and Vetterli 2007",
        whole=True,
    )
    return (*found, rank)


_SOURCE = "Bjorck and Golub 1973"

MEASURE = PairMeasure(quantities=_quantities(), compute=subspaces)
