"""Looking often: the published levels, and the coverage of the intervals where sweeps stop, by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from esdtool.comparison.power import detectable, deviation_limit, power, power_of, seeds_needed
from esdtool.comparison.stopping import look_at, nominal_level, planned_looks


@pytest.mark.parametrize(("looks", "published"), [(2, 0.0294), (3, 0.0221), (4, 0.0182), (5, 0.0158), (10, 0.0106)])
def test_levels_are_those_of_pococks_table(looks: int, published: float) -> None:
    counts = tuple(range(10, 10 * looks + 1, 10))
    assert 1 - nominal_level(counts) == pytest.approx(published, abs=1.5e-4)


@pytest.mark.parametrize(("first", "maximum"), [(2, 24), (4, 12)])
def test_intervals_hold_wherever_a_sweep_stops(first: int, maximum: int) -> None:
    """By width as `--until` does, and even where one stops only when the interval has just lost the truth."""
    looks = planned_looks(first, maximum)
    level, trials = nominal_level(looks), 20_000
    draws = np.random.default_rng(0).standard_normal((trials, maximum))
    misses = np.zeros(trials, dtype=bool)
    ordinary = np.zeros(trials, dtype=bool)
    for width in (1.0, 1.5, 2.0):
        waiting, covered = np.ones(trials, dtype=bool), np.zeros(trials, dtype=bool)
        for count in looks:
            mean = draws[:, :count].mean(1)
            error = draws[:, :count].std(1, ddof=1) / np.sqrt(count)
            reach = stats.t(count - 1).ppf((1 + level) / 2) * error
            misses |= np.abs(mean) > reach
            ordinary |= np.abs(mean) > stats.t(count - 1).ppf(0.975) * error
            stops = waiting & ((2 * reach < width) | (count == maximum))
            covered[stops] = (np.abs(mean) <= reach)[stops]
            waiting &= ~stops
        assert covered.mean() > 0.95
    assert 0.935 < 1 - misses.mean() < 0.96
    assert 1 - ordinary.mean() < 0.9  # what the correction is for


def test_a_look_is_in_percent_and_paired() -> None:
    looks = (3, 5)
    first, second = [10.1, 20.4, 5.0], [10.0, 20.0, 5.0]
    found = look_at(first, second, looks)
    differences = 100 * np.log(np.array(first) / np.array(second))
    interval = stats.ttest_1samp(differences, 0).confidence_interval(nominal_level(looks))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.difference == pytest.approx(differences.mean())
    assert (found.number, found.planned) == (1, 2)
    assert (
        look_at([2 * value for value in first], [2 * value for value in second], looks) == found
    )  # whatever the scale


@pytest.mark.parametrize(("effect", "deviation", "seeds"), [(0.5, 1.0, 5), (1.0, 0.8, 8), (0.0, 1.0, 6)])
def test_power_is_the_share_of_t_tests_that_find_the_effect(effect: float, deviation: float, seeds: int) -> None:
    draws = np.random.default_rng(1).normal(effect, deviation, (20_000, seeds))
    found = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert power(effect, deviation, seeds) == pytest.approx(found.mean(), abs=0.012)


def test_seeds_needed_is_the_smallest_number_that_suffices() -> None:
    for deviation, effect in ((1.0, 0.5), (0.4, 0.3), (0.01, 5.0), (1.0, 1.7)):
        seeds = seeds_needed(deviation, effect)
        assert power(effect, deviation, seeds) >= 0.8
        assert seeds == 2 or power(effect, deviation, seeds - 1) < 0.8
        assert detectable(deviation, seeds) <= effect * (1 + 1e-6)
    assert seeds_needed(5.0, 0.001) == 10_000


def test_the_limit_of_the_spread_holds_nine_times_in_ten() -> None:
    deviations = np.random.default_rng(2).normal(0, 0.7, (20_000, 4)).std(1, ddof=1)
    assert (deviations * deviation_limit(1.0, 4) > 0.7).mean() == pytest.approx(0.9, abs=0.01)
    found = power_of("a", "b", [10.0, 10.2, 10.1], [10.0, 10.0, 10.0])
    assert found.deviation_limit == pytest.approx(found.deviation * deviation_limit(1.0, 3))
    assert all(few <= many for few, many in zip(found.needed, found.needed_at_most, strict=True))
