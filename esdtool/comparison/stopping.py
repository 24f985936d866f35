"""Decide when a sweep has enough seeds: a rule fixed before the first run, and intervals that allow for looking often.

A sweep that adds seeds until a 95 % interval is narrow enough looks at its data several times and stops where the runs
happen to agree. An ordinary interval then misses the truth more often than one time in twenty. The intervals here are
repeated confidence intervals (Jennison and Turnbull, 1989): each of the planned looks has the same nominal level, such
that all the intervals hold together with 95 % (Pocock, 1977), and with them the one at which the sweep stops, whatever
made it stop. The level is exact for normal differences of known variance. Carried over to Student's t, as in Pocock's
paper, it gives 94 % for all looks together, and more than 96 % where a sweep stops by width (simulated, 4 to 24 seeds).
"""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from esdtool.errors import UsageError

STEP: Final = 2
"""Seeds that are added between two looks."""
_CONFIDENCE: Final = 0.95
_POINTS: Final = 20_000
"""Evaluations of the multivariate normal integral: three digits of the level, in less than a second."""
_SHAPE: Final = "write it as 'SETTING - SETTING: ci 0.3%'"


@dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """`FIRST - SECOND: ci WIDTH%`: seeds are added until the interval of the difference is narrower than the width."""

    first: str
    """Name of a setting, as the sweep names its folder."""
    second: str
    """Name of the setting that is subtracted."""
    width: float
    """Upper end minus lower end of the interval, in percent of the perplexity."""

    def __str__(self) -> str:
        """Return the rule as it is written."""
        return f"{self.first} - {self.second}: ci {self.width:g}%"


@dataclass(frozen=True, kw_only=True)
class Look:
    """The difference of two settings after so many seeds. Numbers are in percent of the perplexity."""

    seeds: int
    number: int
    """The place among the planned looks, counted from 1."""
    planned: int
    """Looks in all, if the sweep goes on to its maximum."""
    level: float
    """Nominal confidence of the interval at each look, so that all of them together hold with 95 %."""
    difference: float
    """100 times the mean difference of the logarithms of the perplexities; negative is better."""
    low: float
    high: float

    @property
    def width(self) -> float:
        """Upper end minus lower end."""
        return self.high - self.low


def parse_rule(text: str) -> StoppingRule:
    """Read a rule.

    >>> parse_rule("alphadecay - mean: ci 0.3%")
    StoppingRule(first='alphadecay', second='mean', width=0.3)

    Raises:
        UsageError: if it has another form, compares a setting with itself or asks for a width that is not positive.
    """
    found = re.fullmatch(r"\s*(\S+)\s+-\s+(\S+?)\s*:\s*ci\s+(\S+?)\s*%\s*", text)
    if found is None:
        raise UsageError(f"{text!r} is no rule for stopping: {_SHAPE}")
    first, second, number = found.groups()
    try:
        width = float(number)
    except ValueError:
        width = math.nan
    if not (math.isfinite(width) and width > 0):
        raise UsageError(f"{text!r}: {number} is no positive number of percent: {_SHAPE}")
    if first == second:
        raise UsageError(f"{text!r} compares {first} with itself: {_SHAPE}")
    return StoppingRule(first=first, second=second, width=width)


def planned_looks(first: int, maximum: int) -> tuple[int, ...]:
    """Return the numbers of seeds at which the sweep looks: the file's, two more at a time, and the maximum.

    >>> planned_looks(4, 9)
    (4, 6, 8, 9)

    Raises:
        UsageError: for fewer than two seeds to begin with, or a maximum below them.
    """
    if first < 2:
        raise UsageError("a rule for stopping needs at least 2 seeds to begin with: write [sweep] seeds = [0, 1, 2, 3]")
    if maximum < first:
        raise UsageError(f"a maximum of {maximum} seeds, but [sweep] has {first} to begin with")
    return (*range(first, maximum, STEP), maximum)


@functools.lru_cache(maxsize=32)
def nominal_level(looks: tuple[int, ...]) -> float:
    """Return Pocock's confidence level of each look, for which all intervals together hold with 95 %.

    Args:
        looks: numbers of seeds, ascending.

    >>> round(nominal_level((10,)), 4), round(nominal_level((10, 20)), 3)  # Pocock's table has 1 - 0.0294
    (0.95, 0.971)
    """
    if len(looks) == 1:
        return _CONFIDENCE
    import numpy as np
    from scipy import optimize, stats

    counts = np.asarray(looks, dtype=float)
    # Means of the first n and the first m of the same differences.
    correlation = np.sqrt(np.minimum.outer(counts, counts) / np.maximum.outer(counts, counts))

    def excess(bound: float) -> float:
        accuracy: dict[str, Any] = {"maxpts": _POINTS, "abseps": 1e-4, "releps": 1e-4}
        scores = stats.multivariate_normal(mean=np.zeros(len(counts)), cov=correlation, seed=0, **accuracy)
        corner = np.full(len(counts), bound)
        return float(scores.cdf(corner, lower_limit=-corner)) - _CONFIDENCE

    upper = float(stats.norm.isf((1 - _CONFIDENCE) / (2 * len(counts))))  # Bonferroni's bound is beyond it
    bound = optimize.brentq(excess, float(stats.norm.isf((1 - _CONFIDENCE) / 2)) - 1e-3, upper + 1e-3, xtol=1e-4)
    return 1 - 2 * float(stats.norm.sf(bound))


def look_at(first: Sequence[float], second: Sequence[float], looks: tuple[int, ...]) -> Look:
    """Compare two settings after as many seeds as there are perplexities.

    Args:
        first: final perplexities, one for each seed.
        second: of the setting that is subtracted, the same seeds in the same order.
        looks: of `planned_looks`; the number of seeds is one of them.
    """
    from scipy import stats

    differences = [100 * math.log(one / other) for one, other in zip(first, second, strict=True)]
    count, level = len(differences), nominal_level(looks)
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(count)
    reach = float(stats.t(count - 1).ppf((1 + level) / 2)) * error
    return Look(
        seeds=count,
        number=looks.index(count) + 1,
        planned=len(looks),
        level=level,
        difference=mean,
        low=mean - reach,
        high=mean + reach,
    )
