"""The numbers that decays can follow, from an alpha and the metrics of a spectrum."""

from __future__ import annotations

import math
from typing import Protocol

from esdtool.assignment.options import LARGEST_SCORE, ScoreName


class Metrics(Protocol):
    """Metrics of a spectrum: of `esdtool.spectra.metrics.SpectralMetrics` or of a module of an analysis."""

    @property
    def lambda_max(self) -> float | None: ...
    @property
    def log_spectral_norm(self) -> float | None: ...
    @property
    def frobenius_norm(self) -> float | None: ...
    @property
    def spectral_norm(self) -> float | None: ...
    @property
    def stable_rank(self) -> float | None: ...
    @property
    def entropy(self) -> float | None: ...
    @property
    def entropy_smoothed(self) -> float | None: ...


def score_value(score: ScoreName, alpha: float | None, metrics: Metrics) -> float | None:
    """Compute what a module's decay follows.

    `eigenvalue_sum`, `lambda_max`, `alphahat-softplus` and `entropy-smoothed` are the definitions of the public code of
    AlphaDecay (its `fnorm`, `spectral_norm`, `alphahat` and `entropy`); the others are the field's.

    Args:
        score: its name.
        alpha: the module's tail exponent; None if it has none.
        metrics: of the module's spectrum.

    Returns:
        The score; None if it rests on a number that is not there (an estimated spectrum has no entropy).
    """
    match score:
        case "alpha":
            return alpha
        case "alpha_weighted" | "alphahat-softplus":
            if alpha is None or metrics.log_spectral_norm is None:
                return None
            weighted = alpha * metrics.log_spectral_norm  # Martin, Peng and Mahoney 2021
            return weighted if score == "alpha_weighted" else softplus(weighted)
        case "eigenvalue_sum":
            return None if metrics.frobenius_norm is None else metrics.frobenius_norm * metrics.frobenius_norm
        case "lambda_max":
            return metrics.lambda_max
        case "frobenius_norm":
            return metrics.frobenius_norm
        case "spectral_norm":
            return metrics.spectral_norm
        case "stable_rank":
            return metrics.stable_rank
        case "entropy":
            return metrics.entropy
        case "entropy-smoothed":
            return metrics.entropy_smoothed


def checked_score(score: str, value: float | None, *, is_estimated: bool = False) -> tuple[float | None, str]:
    """Tell whether a score can be used.

    Args:
        score: its name.
        value: the score; None if there is none.
        is_estimated: whether the spectrum was not computed, but estimated.

    Returns:
        (the score, `ok`), or (None, why there is none).
    """
    if value is None and (is_estimated or score.startswith("alpha")):
        return None, f"no {score} by this estimator"
    if value is None:
        return None, f"{score} is outside the range of float64"
    if not abs(value) <= LARGEST_SCORE:
        return None, f"{score} {value:g} is beyond {LARGEST_SCORE:g}"
    return value, "ok"


def softplus(value: float) -> float:
    """Compute ln(1 + e^value) without overflow.

    >>> softplus(0.0) == math.log(2), softplus(1000.0)
    (True, 1000.0)
    """
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))
