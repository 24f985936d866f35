"""The maps of LLR, TempBalance and Model Balancing against published and hand-worked numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from esdtool.assignment.learning_rate_maps import (
    LEARNING_RATE_MAPS,
    balancing_ratio,
    balancing_ratios,
    linear_ratios,
    step_ratios,
)
from esdtool.errors import UsageError


def test_llr_on_seven_modules() -> None:
    """Section 3 of arXiv 2605.22297 with s1 = 1, s2 = 5, worked by hand."""
    alphas = [1.5, 1.5, 1.7, 1.6, 2.4, 2.4, 2.5]
    assert LEARNING_RATE_MAPS["llr"].published == (1, 5)
    assert linear_ratios(alphas, 1, 5) == pytest.approx([1, 1, 1.8, 1.4, 4.6, 4.6, 5], abs=1e-12)


def test_tempbalance_on_three_modules() -> None:
    assert LEARNING_RATE_MAPS["tempbalance"].published == (0.5, 1.5)
    assert linear_ratios([2, 3, 5], 0.5, 1.5) == pytest.approx([0.5, 0.5 + 1 / 3, 1.5], abs=1e-12)
    assert step_ratios([5, 2, 3], 0.5, 1.5) == pytest.approx([0.5 + 2 / 3, 0.5, 0.5 + 1 / 3], abs=1e-12)


def test_model_balancing_on_three_deviations() -> None:
    found = [balancing_ratio(deviation, 2, 1) for deviation in (-0.1, 0.0, 0.3)]
    assert found == pytest.approx([10**-0.4621171573, 1, 10**0.4525741268], rel=1e-9)


scores = st.lists(st.floats(min_value=1.01, max_value=50), min_size=1, max_size=20)


@given(scores)
def test_model_balancing_is_the_published_formula(values: list[float]) -> None:
    deviations = np.array(values) - np.mean(values)
    with np.errstate(over="ignore"):
        expected = 10 ** (np.where(deviations > 0, 1, 2) * (expit(10 * deviations) - 0.5))
    np.testing.assert_allclose(balancing_ratios(values), expected, rtol=1e-9)


@pytest.mark.parametrize("name", LEARNING_RATE_MAPS)
@given(values=scores)
def test_a_larger_score_never_has_a_smaller_ratio(name: str, values: list[float]) -> None:
    chosen = LEARNING_RATE_MAPS[name]  # type: ignore[index]
    ratios = chosen.ratios(values, *(chosen.published or (1.0, 1.0)))
    ordered = [ratio for _, ratio in sorted(zip(values, ratios, strict=True))]
    assert all(low <= high * (1 + 1e-12) for low, high in itertools.pairwise(ordered))
    assert all(ratio >= 0 and math.isfinite(ratio) for ratio in ratios)


@pytest.mark.parametrize("name", LEARNING_RATE_MAPS)
def test_equal_scores_have_ratio_one(name: str) -> None:
    chosen = LEARNING_RATE_MAPS[name]  # type: ignore[index]
    assert chosen.ratios([2.5] * 4, *(chosen.published or (1.0, 1.0))) == [1.0] * 4
    assert chosen.ratios([], *(chosen.published or (1.0, 1.0))) == []


def test_equal_scores_share_a_step() -> None:
    assert step_ratios([1.0, 3.0, 3.0, 4.0], 0, 4) == [0, 1.5, 1.5, 3]


@pytest.mark.parametrize("name", ["llr", "tempbalance-step", "model-balancing"])
@pytest.mark.parametrize("low", [-1.0, math.nan, math.inf])
def test_senseless_bounds_are_refused(name: str, low: float) -> None:
    with pytest.raises(UsageError, match="finite and not negative"):
        LEARNING_RATE_MAPS[name].ratios([1.0, 2.0], low, 2.0)  # type: ignore[index]
