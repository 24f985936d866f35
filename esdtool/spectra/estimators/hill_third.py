"""`hill-third`: `hill` with a third of the eigenvalues in the tail (Model Balancing, arXiv 2410.12178)."""

from __future__ import annotations

from esdtool.spectra.estimator import Estimator
from esdtool.spectra.estimators.hill import hill, hill_index

_K_FRACTION = 1 / 3

ESTIMATOR = Estimator(
    fit=lambda eigenvalues, _: hill(eigenvalues, k_fraction=_K_FRACTION),
    xmin_index=lambda size, _: hill_index(size, _K_FRACTION),
)
