"""Jobs of 2 and 4 gloo processes: every rank ends with the same decays, and every spectrum is computed once."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esdtool.support.balance import balance

Job = Callable[[int], list[dict[str, Any]]]
REFRESHES = 4  # on construction, and at steps 2, 4 and 6
MODULES = 14


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["ddp", "fsdp", "first-rank", "gradients", "ddp-late", "fsdp-late"])
def test_every_rank_has_the_same_decays(job: Job, size: int, way: str, tiny: ModuleType) -> None:
    first, *others = (rank[way] for rank in job(size))
    assert set(first["decays"][0]) == set(tiny.assigned())
    for other in others:
        assert (other["decays"], other["alphas"]) == (first["decays"], first["alphas"])
        assert (other["in_groups"], other["late"]) == (first["in_groups"], first["late"])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("way", ["ddp", "fsdp", "first-rank", "gradients", "ddp-late", "fsdp-late"])
def test_the_number_of_ranks_does_not_matter(job: Job, size: int, way: str) -> None:
    """Gradients are averaged over ranks in another order than over a batch, so weights agree to rounding only."""
    alone, together = job(1)[0][way], job(size)[0][way]
    for step, decays in enumerate(alone["decays"]):
        assert together["decays"][step] == pytest.approx(decays, rel=1e-3)
        if step < 2 and way != "gradients":  # no update has been made yet
            assert together["decays"][step] == decays


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_late_decays_are_those_of_the_snapshot(job: Job, size: int, way: str) -> None:
    """Up to the first step at which the two runs differ, and which is the first with decays from updated weights."""
    for rank in job(size):
        late, now = rank[f"{way}-late"]["decays"], rank[way]["decays"]
        assert late[2] == late[1] == now[1] != now[2] == late[3]


@pytest.mark.parametrize("size", [2, 4])
def test_each_spectrum_is_computed_once(job: Job, size: int) -> None:
    for way in ("ddp", "fsdp", "ddp-late", "fsdp-late"):
        shares = [rank[way]["spectra"] for rank in job(size)]
        assert sum(shares) == REFRESHES * MODULES
        assert min(shares) > 0
    assert [rank["first-rank"]["spectra"] for rank in job(size)] == [REFRESHES * MODULES] + [0] * (size - 1)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("way", ["both-ddp", "both-fsdp-late"])
def test_learning_rates_and_decays_together(job: Job, size: int, way: str) -> None:
    """Every rank has the same of both, one process has the same too, and both cost one set of spectra."""
    (alone,), ranks = job(1), [rank[way] for rank in job(size)]
    for rank in ranks:
        assert (rank["seen"], rank["state"]) == (ranks[0]["seen"], ranks[0]["state"])
    assert alone[way]["spectra"] == sum(rank["spectra"] for rank in ranks) == REFRESHES * MODULES
    for step, (one, several) in enumerate(zip(alone[way]["seen"], ranks[0]["seen"], strict=True)):
        for what in ("rates", "decays"):
            assert several[what] == pytest.approx(one[what], rel=1e-3)
            if step == 0:  # no update has been made yet
                assert several[what] == one[what]


@pytest.mark.parametrize("size", [2, 4])
def test_problems_are_errors_on_every_rank(job: Job, size: int) -> None:
    for rank in job(size):
        assert rank["mismatch"].startswith("the ranks hold different weight modules")
        assert rank["failure"] == "the spectra failed on rank 1: MemoryError: no memory"
        assert rank["late failure"] == "the spectra failed on rank 1: MemoryError: no memory"
        assert rank["fsdp-late"]["refused"].startswith("a refresh is under way: call AlphaDecay.settle() on every rank")


@given(st.lists(st.floats(min_value=1, max_value=1e9), max_size=40), st.integers(min_value=1, max_value=8))
def test_balance(costs: list[float], num_ranks: int) -> None:
    """Graham's bound for longest-processing-time scheduling: no rank has more than the mean plus one item."""
    owners = balance(costs, num_ranks)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(num_ranks)]
    assert len(owners) == len(costs)
    assert max(loads) <= (sum(costs) / num_ranks + max(costs, default=0)) * (1 + 1e-9)
