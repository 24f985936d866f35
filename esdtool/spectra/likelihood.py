"""Tail fits by the `powerlaw` package, with likelihood-ratio tests against other distributions.

The package (Alstott, Bullmore and Plenz 2014) chooses xmin as `esdtool.spectra.tail.ks_fit` does and is
slower; its use is the comparison: is the tail a power law, or would a lognormal do as well?
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from esdtool.spectra.tail import TailFit

ALTERNATIVES = ("lognormal", "exponential", "truncated_power_law")

# `warnings.catch_warnings` changes the state of the whole process.
_LOCK = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class LikelihoodRatio:
    """The power law against one alternative on the same tail."""

    ratio: float
    """Normalised log-likelihood ratio; positive favours the power law."""
    p_value: float
    """Probability of so large a ratio if neither were better."""


def powerlaw_fit(eigenvalues: npt.ArrayLike) -> tuple[TailFit, dict[str, LikelihoodRatio]]:
    """Fit the positive eigenvalues with `powerlaw.Fit` and compare it with `ALTERNATIVES`.

    Raises:
        ValueError: if there are fewer than two distinct positive eigenvalues.
    """
    ordered = np.sort(np.asarray(eigenvalues, dtype=np.float64).reshape(-1))
    positive = ordered[ordered > 0]
    if np.unique(positive).size < 2:
        raise ValueError("a tail fit needs at least two distinct positive eigenvalues")
    # The package's optimisers have absolute tolerances: give them numbers near 1.
    scale = float(np.median(positive))
    with _LOCK, warnings.catch_warnings(), np.errstate(all="ignore"):
        # Notes on its own optimisers' progress, and a deprecated call of its own.
        warnings.simplefilter("ignore")
        import powerlaw  # imports pyplot, so not at the top

        fit: Any = powerlaw.Fit(
            positive / scale,
            verbose=False,
            # Its default range ends at 3, and a true alpha of 5 would come back as 3.
            parameter_ranges={"alpha": [1, None]},
        )
        comparisons = {}
        for alternative in ALTERNATIVES:
            ratio, p_value = fit.distribution_compare("power_law", alternative, normalized_ratio=True)
            if np.isfinite(ratio) and np.isfinite(p_value):
                comparisons[alternative] = LikelihoodRatio(ratio=float(ratio), p_value=float(p_value))
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
        ),
        comparisons,
    )
