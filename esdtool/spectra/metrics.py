"""Measures of a spectrum beside alpha, under the names of the field (WeightWatcher, SETOL)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esdtool.spectra.slq import SlqEstimate
from esdtool.spectra.spectrum import Spectrum

Vector = npt.NDArray[np.float64]

_EPS32 = float(np.finfo(np.float32).eps)
_LOG10_2 = math.log10(2)

_SMOOTHING = 6e-5
"""What the public code of AlphaDecay adds to each share of its entropy, and its bound for singular values."""

_REPORTED_ERROR = 1e-3
"""Largest relative error of a float32 eigenvalue that is reported."""


@dataclass(frozen=True, kw_only=True)
class SpectralMetrics:
    """The metrics of the eigenvalues lambda_1 <= ... <= lambda_n of W^T W of a module, except alpha."""

    lambda_max: float | None
    """Largest eigenvalue. It, the other eigenvalues and the norms are None where float64 has no number of their
    size (weights beyond 1e-155 .. 1e153); the logarithms and ratios are there all the same."""
    lambda_min: float | None
    """Smallest eigenvalue; 0 where it is below the float64 floor, None where float32 does not resolve it."""
    lambda_median: float | None
    """Median eigenvalue; None where float32 does not resolve it. Estimated where alpha is."""
    frobenius_norm: float | None
    """sqrt(sum lambda)."""
    spectral_norm: float | None
    """sqrt(lambda_max)."""
    stable_rank: float
    """sum lambda / lambda_max."""
    entropy: float | None
    """-sum p ln p / ln n with p = lambda / sum lambda: 0 for rank one, 1 for a flat spectrum."""
    entropy_smoothed: float | None
    """-sum p ln p / ln(r + e) with p = lambda / sum lambda + e, e = 6e-5, and r the number of singular values above e:
    the entropy of the public code of AlphaDecay. It depends on the scale of the weights where e does not."""
    effective_rank: float | None
    """exp(-sum p ln p) (Roy and Vetterli 2007)."""
    matrix_rank: int | None
    """Singular values above sigma_max * max(rows, columns) * eps(float32): numpy's rule for float32 weights.
    None where float32 does not resolve the smallest eigenvalues."""
    log_norm: float
    """log10 sum lambda."""
    log_spectral_norm: float
    """log10 lambda_max."""
    num_trace_log: int | None
    """Size of the tail by SETOL's trace-log condition (see `num_trace_log`); None at the float32 floor."""


def spectral_metrics(spectrum: Spectrum, shape: tuple[int, int]) -> SpectralMetrics:
    """Compute all metrics of one pooled spectrum, whose largest eigenvalue is positive.

    Args:
        spectrum: the eigenvalues and their accuracy.
        shape: (rows, columns) of each matrix.
    """
    eigenvalues = spectrum.eigenvalues
    total = float(eigenvalues.sum())
    largest = float(eigenvalues[-1])
    share = eigenvalues[eigenvalues > 0] / total
    entropy = float(-(share * np.log(share)).sum())
    rank_tolerance = (max(shape) * _EPS32) ** 2 * largest
    median = float(np.median(eigenvalues))
    trace_log = num_trace_log(eigenvalues)
    floor_resolved = is_resolved(spectrum, float(eigenvalues[0]))
    return SpectralMetrics(
        lambda_max=spectrum.unscaled(largest),
        lambda_min=spectrum.unscaled(float(eigenvalues[0])) if floor_resolved else None,
        lambda_median=spectrum.unscaled(median) if is_resolved(spectrum, median) else None,
        frobenius_norm=spectrum.unscaled(math.sqrt(total), power=2),
        spectral_norm=spectrum.unscaled(math.sqrt(largest), power=2),
        stable_rank=total / largest,
        entropy=entropy / math.log(eigenvalues.size) if eigenvalues.size > 1 else 0.0,
        entropy_smoothed=_smoothed_entropy(eigenvalues, total, exponent=spectrum.exponent),
        effective_rank=math.exp(entropy),
        matrix_rank=int((eigenvalues > rank_tolerance).sum()) if floor_resolved else None,
        log_norm=math.log10(total) + spectrum.exponent * _LOG10_2,
        log_spectral_norm=math.log10(largest) + spectrum.exponent * _LOG10_2,
        num_trace_log=trace_log if is_resolved(spectrum, float(eigenvalues[-trace_log])) else None,
    )


def estimated_metrics(estimate: SlqEstimate) -> SpectralMetrics:
    """Compute what can be said of one matrix without its eigenvalues; the rest is None.

    Args:
        estimate: its sum and its top are computed, its median is estimated.
    """
    total, largest = estimate.total, estimate.lambda_max
    return SpectralMetrics(
        lambda_max=largest,
        lambda_min=None,
        lambda_median=estimate.lambda_median,
        frobenius_norm=math.sqrt(total),
        spectral_norm=math.sqrt(largest),
        stable_rank=total / largest,
        entropy=None,
        entropy_smoothed=None,
        effective_rank=None,
        matrix_rank=None,
        log_norm=math.log10(total),
        log_spectral_norm=math.log10(largest),
        num_trace_log=None,
    )


def _smoothed_entropy(eigenvalues: Vector, total: float, *, exponent: int) -> float | None:
    """Compute the entropy of the public code of AlphaDecay; None where its rank is 0."""
    # By logarithms, since float64 may have no number of the eigenvalues' true size.
    rank = int((np.log2(eigenvalues[eigenvalues > 0]) + exponent > 2 * math.log2(_SMOOTHING)).sum())
    if rank == 0:
        return None
    share = eigenvalues / total + _SMOOTHING
    return float(-(share * np.log(share)).sum()) / math.log(rank + _SMOOTHING)


def is_resolved(spectrum: Spectrum, eigenvalue: float) -> bool:
    """Return whether a number that rests on this eigenvalue may be reported; float64 errors of 1e-13 always may."""
    return spectrum.path != "gram-float32" or spectrum.relative_error(eigenvalue) <= _REPORTED_ERROR


def num_trace_log(eigenvalues: Vector) -> int:
    """Return the number of top eigenvalues whose logarithms sum closest to 0, after rescaling the spectrum to mean 1.

    The trace-log (volume-preserving) condition of SETOL (Martin and Hinrichs, arXiv 2507.17912): the tail that it
    selects should start near xmin where a layer is ideally trained.

    >>> num_trace_log(np.array([0.5, 0.5, 2.0, 1.0]))
    3

    Args:
        eigenvalues: [n], not negative.
    """
    positive = np.sort(eigenvalues[eigenvalues > 0])[::-1]
    sums = np.cumsum(np.log(positive) - math.log(float(eigenvalues.mean())))
    # The sums rise while eigenvalues exceed the mean and fall after; the condition is met on the way down.
    top = int(np.argmax(sums))
    return top + int(np.argmin(np.abs(sums[top:]))) + 1


def alpha_weighted(alpha: float, lambda_max: float) -> float:
    """Compute alpha log10 lambda_max (Martin, Peng and Mahoney 2021)."""
    return alpha * math.log10(lambda_max)


def log_alpha_norm(alpha: float, eigenvalues: Vector, *, exponent: int = 0) -> float:
    """Compute log10 sum lambda^alpha, the log alpha-Schatten norm, without overflow.

    Args:
        alpha: exponent.
        eigenvalues: [n] over 2^`exponent`, not negative.
        exponent: see `Spectrum.exponent`.
    """
    logs = alpha * np.log(eigenvalues[eigenvalues > 0])
    peak = float(logs.max())
    return (peak + math.log(float(np.exp(logs - peak).sum()))) / math.log(10) + alpha * exponent * _LOG10_2
