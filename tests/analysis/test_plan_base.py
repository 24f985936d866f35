"""What a base adds to a plan: the order in which ranks read, and memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from esdtool.analysis.plan import make_plan
from esdtool.checkpoint import from_state_dict
from esdtool.errors import CheckpointError
from esdtool.spectra.options import ScoreOptions

NAMES = [f"layers.{index}.q_proj" for index in range(3)]


def _weights() -> Any:
    return from_state_dict({f"{name}.weight": torch.randn(64, 64) for name in NAMES})


def _adapter() -> Any:
    sides = {"A": (4, 64), "B": (64, 4)}
    return from_state_dict({f"{name}.lora_{side}.weight": torch.randn(sides[side]) for name in NAMES for side in sides})


@pytest.mark.parametrize("kind", ["difference", "adapter"])
def test_a_sharded_base_is_read_by_all_ranks_in_one_order(kind: str) -> None:
    base = dataclasses.replace(_weights(), collective_reads=True)
    plan = make_plan(_adapter() if kind == "adapter" else _weights(), ScoreOptions(), base=base, jobs=4)
    assert plan.collective_reads
    assert plan.jobs == 1
    assert not plan.limits.read_ahead
    free = make_plan(_adapter() if kind == "adapter" else _weights(), ScoreOptions(), base=_weights(), jobs=3)
    assert not free.collective_reads
    assert free.jobs == 3


def test_a_sharded_adapter_stays_sharded_when_it_is_merged() -> None:
    adapter = dataclasses.replace(_adapter(), collective_reads=True)
    assert make_plan(adapter, ScoreOptions(), base=_weights()).collective_reads


def test_memory_counts_the_base_and_the_difference() -> None:
    alone = make_plan(_weights(), ScoreOptions(), jobs=1)
    for source in (_weights(), _adapter()):
        plan = make_plan(source, ScoreOptions(), base=_weights(), jobs=1)
        assert plan.peak_bytes >= alone.peak_bytes + 2 * 4 * 64 * 64


def test_an_adapter_is_no_base() -> None:
    for source in (_weights(), _adapter()):
        with pytest.raises(CheckpointError, match="an adapter, not a base"):
            make_plan(source, ScoreOptions(), base=_adapter())
