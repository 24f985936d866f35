"""`powerlaw`: the fit of the package `powerlaw`, with likelihood-ratio tests against other distributions.

The package (Alstott, Bullmore and Plenz 2014) chooses xmin as the estimator `ks` does and is slower; its use is the
comparison: is the tail a power law, or would a lognormal do as well?
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from esdtool.spectra.estimator import Estimator
from esdtool.spectra.estimators import ks
from esdtool.spectra.laws import compare_laws, quiet_package
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.tail import LikelihoodRatio, TailFit, Vector


def powerlaw_fit(eigenvalues: npt.ArrayLike) -> tuple[TailFit, dict[str, LikelihoodRatio]]:
    """Fit the positive eigenvalues with `powerlaw.Fit`, and test the fit against the laws of `esdtool.spectra.laws`.

    Args:
        eigenvalues: [n], any order, not negative.

    Returns:
        The tail, and the test against each alternative by its name.

    Raises:
        ValueError: if there are fewer than two distinct positive eigenvalues.
    """
    ordered = np.sort(np.asarray(eigenvalues, dtype=np.float64).reshape(-1))
    positive = ordered[ordered > 0]
    if np.unique(positive).size < 2:
        raise ValueError("a tail fit needs at least two distinct positive eigenvalues")
    # The package's optimisers have absolute tolerances: give them numbers near 1.
    scale = float(np.median(positive))
    with quiet_package() as powerlaw:
        fit: Any = powerlaw.Fit(
            positive / scale,
            verbose=False,
            # Its default range ends at 3, and a true alpha of 5 would come back as 3.
            parameter_ranges={"alpha": [1, None]},
        )
        comparisons, best = compare_laws(fit)
        alpha, distance, xmin = float(fit.power_law.alpha), float(fit.power_law.D), float(fit.xmin) * scale
    # xmin comes back through a division and a multiplication: take the eigenvalue that it stands for.
    index = int(np.argmin(np.abs(ordered - xmin)))
    return (
        TailFit(
            alpha=alpha,
            xmin=float(ordered[index]),
            xmin_index=index,
            num_tail=ordered.size - index,
            ks_distance=distance,
            best_law=best,
        ),
        comparisons,
    )


def _fit(eigenvalues: Vector, options: ScoreOptions) -> TailFit:
    del options
    fit, comparisons = powerlaw_fit(eigenvalues)
    return replace(fit, comparisons=comparisons)


ESTIMATOR = Estimator(fit=_fit, null_fit=ks.ESTIMATOR.fit)
