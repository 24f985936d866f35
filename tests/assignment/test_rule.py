"""Ratios of groups and controls: what is equal stays equal, and the mean is what was asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esdtool.assignment.rule import DecayRule, decay_ratios

LAYERS = [0, 0, 0, 1, 1, 1, 2, 2, 2]
ROLES = ["q", "k", "v"] * 3
scores = st.lists(st.floats(1.1, 9.0), min_size=9, max_size=9)
sizes = st.lists(st.integers(1, 10**9), min_size=9, max_size=9)
controls = st.sampled_from(["none", "mean", "shuffled", "reversed"])


def ratios(rule: DecayRule, values: list[float], weights: list[int]) -> list[float]:
    return rule.ratios(values, layers=LAYERS, roles=ROLES, sizes=weights)


@given(
    values=scores,
    weights=sizes,
    control=controls,
    granularity=st.sampled_from(["module", "layer", "role"]),
    assign=st.sampled_from(["linear", "sqrt", "log2"]),
    seed=st.integers(0, 9),
)
def test_the_normalized_mean_is_one_under_every_control(
    values: list[float], weights: list[int], control: Any, granularity: Any, assign: Any, seed: int
) -> None:
    rule = DecayRule(assign=assign, granularity=granularity, normalize=True, control=control, control_seed=seed)
    found = ratios(rule, values, weights)
    mean = math.fsum(ratio * weight for ratio, weight in zip(found, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(1.0, rel=1e-14)


@given(
    values=scores,
    weights=sizes,
    control=controls,
    granularity=st.sampled_from(["layer", "role"]),
    seed=st.integers(0, 9),
    normalize=st.booleans(),
)
def test_a_layer_or_role_has_one_ratio_under_every_control(
    values: list[float], weights: list[int], control: Any, granularity: Any, seed: int, normalize: bool
) -> None:
    rule = DecayRule(granularity=granularity, control=control, control_seed=seed, normalize=normalize)
    found = ratios(rule, values, weights)
    groups = LAYERS if granularity == "layer" else ROLES
    by_group: dict[object, set[float]] = {}
    for group, ratio in zip(groups, found, strict=True):
        by_group.setdefault(group, set()).add(ratio)
    assert all(len(held) == 1 for held in by_group.values())


@given(values=scores, granularity=st.sampled_from(["module", "layer", "role"]), seed=st.integers(0, 9))
def test_controls_deal_out_the_ratios_of_the_method(values: list[float], granularity: Any, seed: int) -> None:
    weights = [1] * 9
    plain = ratios(DecayRule(granularity=granularity), values, weights)
    for control in ("shuffled", "reversed"):
        rule = DecayRule(granularity=granularity, control=control, control_seed=seed)
        assert sorted(ratios(rule, values, weights)) == pytest.approx(sorted(plain))


def test_reversed_gives_the_strongest_decay_to_the_heaviest_layer() -> None:
    values = [2.0, 2.2, 2.1, 3.0, 3.3, 2.9, 4.0, 4.2, 4.1]
    found = ratios(DecayRule(granularity="layer", control="reversed", min_ratio=0.5, max_ratio=2.0), values, [1] * 9)
    assert (found[0], found[-1]) == (2.0, 0.5)


@given(values=st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=6))
def test_scores_of_any_size_give_finite_ratios(values: list[float]) -> None:
    for assign in ("linear", "sigmoid"):
        found = decay_ratios(values, assign=assign, layers=[0] * len(values))  # type: ignore[arg-type]
        assert all(math.isfinite(ratio) and ratio >= 0 for ratio in found)


@pytest.mark.parametrize("score", [1e101, -1e308, math.inf, math.nan])
def test_scores_beyond_use_are_refused(score: float) -> None:
    with pytest.raises(ValueError, match="scores must be finite"):
        decay_ratios([2.0, score])
