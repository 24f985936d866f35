"""A setting against uniform decay, seed by seed: the difference, its standard error and a paired t-test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Mean difference over common seeds, which share initial weights and data order."""

    against: str
    """Label of the setting that is subtracted."""
    seeds: int
    """Common seeds, at least 2."""
    difference: float
    """Mean of this setting's final perplexity minus the other's; negative is better."""
    standard_error: float
    """Sample standard deviation of the differences over the square root of their number."""
    low: float
    """Lower end of the 95 % confidence interval (Student's t)."""
    high: float
    """Upper end."""
    p_value: float | None
    """Two-sided paired t-test, not corrected for the number of comparisons; None if all differences are equal."""


def paired(against: str, these: Mapping[int, float], others: Mapping[int, float]) -> Paired | None:
    """Compare perplexities by seed; None for fewer than two common seeds.

    >>> found = paired("uniform", {0: 19.0, 1: 18.5, 2: 19.3}, {0: 20.0, 1: 20.0, 2: 20.0})
    >>> round(found.difference, 3), round(found.standard_error, 3), round(found.p_value, 3)
    (-1.067, 0.233, 0.045)
    """
    differences = [value - others[seed] for seed, value in these.items() if seed in others]
    count = len(differences)
    if count < 2:
        return None
    from scipy import stats

    mean, error = statistics.fmean(differences), standard_error(differences)
    assert error is not None
    student = stats.t(count - 1)
    reach = float(student.ppf((1 + _CONFIDENCE) / 2)) * error
    return Paired(
        against=against,
        seeds=count,
        difference=mean,
        standard_error=error,
        low=mean - reach,
        high=mean + reach,
        p_value=2 * float(student.sf(abs(mean) / error)) if error > 0 else None,
    )


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean, or None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
