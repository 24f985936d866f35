"""Count the seeds that a comparison needs, from the spread of the differences between runs at hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

EFFECTS: Final = (0.25, 0.5, 1.0, 2.0)
"""Differences for which seeds are counted, in percent of the perplexity."""
_POWER: Final = 0.8
_SIGNIFICANCE: Final = 0.05
_LIMIT: Final = 0.9
"""Confidence of the upper limit of the standard deviation."""
_MOST: Final = 10_000


@dataclass(frozen=True, kw_only=True)
class Power:
    """The reach of a paired comparison of two settings. Numbers are in percent of the perplexity."""

    first: str
    second: str
    seeds: int
    difference: float
    """Mean difference so far; negative is better for `first`."""
    deviation: float
    """Sample standard deviation of the difference between two runs of a seed."""
    deviation_limit: float
    """Upper 90 % confidence limit of `deviation`: few seeds say little of it."""
    detectable: float
    """The smallest difference that these seeds find with a probability of 80 %."""
    needed: tuple[int, ...]
    """Seeds for each of `EFFECTS`, for a deviation as it is estimated."""
    needed_at_most: tuple[int, ...]
    """Seeds for each of `EFFECTS`, for `deviation_limit`."""


def power_of(first: str, second: str, ones: Sequence[float], others: Sequence[float]) -> Power:
    """Calculate from final perplexities.

    Args:
        first: name of a setting.
        second: name of the setting that is subtracted.
        ones: perplexities of the first, one for each seed, at least two.
        others: of the second, the same seeds in the same order.
    """
    differences = [100 * math.log(one / other) for one, other in zip(ones, others, strict=True)]
    count, deviation = len(differences), statistics.stdev(differences)
    limit = deviation_limit(deviation, count)
    return Power(
        first=first,
        second=second,
        seeds=count,
        difference=statistics.fmean(differences),
        deviation=deviation,
        deviation_limit=limit,
        detectable=detectable(deviation, count),
        needed=tuple(seeds_needed(deviation, effect) for effect in EFFECTS),
        needed_at_most=tuple(seeds_needed(limit, effect) for effect in EFFECTS),
    )


def deviation_limit(deviation: float, seeds: int) -> float:
    """Return the upper 90 % confidence limit of a standard deviation that so many normal values gave.

    >>> round(deviation_limit(1.0, 10), 3)  # chi-squared with 9 degrees of freedom: 4.168
    1.469
    """
    from scipy import stats

    return deviation * math.sqrt((seeds - 1) / float(stats.chi2(seeds - 1).ppf(1 - _LIMIT)))


def power(effect: float, deviation: float, seeds: int) -> float:
    """Return the probability that a two-sided paired t-test at 0.05 finds an effect.

    >>> round(power(1.0, 1.0, 10), 3)  # the usual table of the one-sample t-test
    0.803
    """
    from scipy import stats

    if deviation == 0:
        return 1.0 if effect else _SIGNIFICANCE
    freedom, shift = seeds - 1, abs(effect) / deviation * math.sqrt(seeds)
    bound = float(stats.t(freedom).isf(_SIGNIFICANCE / 2))
    if shift > 3 * bound:  # more than 0.997
        return 1.0
    found = stats.nct(freedom, shift)
    wrong_way = float(found.cdf(-bound)) if shift < 5 else 0.0  # less than 1e-6, where scipy may give no number
    return float(found.sf(bound)) + wrong_way


def seeds_needed(deviation: float, effect: float) -> int:
    """Return the smallest number of seeds that finds an effect with a probability of 80 %, or 10,000 for more.

    >>> seeds_needed(1.0, 1.0), seeds_needed(1.0, 0.25)
    (10, 128)
    """
    low, high = 1, 2
    while power(effect, deviation, high) < _POWER:
        if high >= _MOST:
            return _MOST
        low, high = high, min(2 * high, _MOST)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, deviation, middle) >= _POWER else (middle, high)
    return high


def detectable(deviation: float, seeds: int) -> float:
    """Return the smallest effect that so many seeds find with a probability of 80 %."""
    from scipy import optimize, stats

    if deviation == 0:
        return 0.0
    upper = 4 * float(stats.t(seeds - 1).isf(_SIGNIFICANCE / 2)) * deviation / math.sqrt(seeds)
    return float(optimize.brentq(lambda effect: power(effect, deviation, seeds) - _POWER, 0.0, upper))
