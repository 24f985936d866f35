"""A setting against uniform decay, seed by seed: the difference, its standard error and a paired t-test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
    holm_p_value: float | None = None
    """Corrected for the number of comparisons in the same table (Holm, 1979); None as `p_value`."""


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


def corrected(family: Sequence[Paired | None]) -> list[Paired | None]:
    """Fill in `holm_p_value` of the comparisons of one table; those without a p-value take no part."""
    ranked = [found.p_value for found in family if found is not None and found.p_value is not None]
    adjusted = iter(holm(ranked))
    return [
        found if found is None or found.p_value is None else replace(found, holm_p_value=next(adjusted))
        for found in family
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values as they are after Holm's correction for so many tests (Holm, 1979), in the same order.

    If one calls out every test below 0.05, the probability to do so for any true null hypothesis is at most 0.05.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean, or None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
