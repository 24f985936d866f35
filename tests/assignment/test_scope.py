"""Who gets a decay of its own is one decision, whoever asks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import esdtool
from esdtool.assignment.scope import Cause, Patterns, choose
from esdtool.errors import ConfigError, UsageError


@dataclass(frozen=True, kw_only=True)
class Module:
    name: str
    layer: int | None
    rank: int | None = None
    trained: tuple[()] | None = None

    @property
    def parameter(self) -> str:
        return f"{self.name}.weight"


IN_BLOCKS = [Module(name=f"layers.{index}.{leaf}", layer=index) for index in range(4) for leaf in ("q", "k", "v")]
OUTSIDE = Module(name="stem", layer=None)


def test_blocks_are_assigned_and_the_rest_is_said() -> None:
    scope = choose([*IN_BLOCKS, OUTSIDE], Patterns())
    assert scope.assigned == tuple(IN_BLOCKS)
    assert [(left.module, left.cause) for left in scope.left_out] == [(OUTSIDE, Cause.OUTSIDE_BLOCKS)]
    assert scope.remark is not None
    assert scope.remark.startswith("1 of 13 weight modules get no decay of their own: 1 outside the numbered blocks")
    assert not scope.is_surprising
    assert choose([*IN_BLOCKS, OUTSIDE, Module(name="other", layer=None)], Patterns()).is_surprising


def test_without_blocks_all_are_assigned() -> None:
    scope = choose([OUTSIDE], Patterns())
    assert scope.assigned == (OUTSIDE,)
    assert scope.remark is None


def test_include_exclude_and_low_rank() -> None:
    low_rank = Module(name="layers.0.update", layer=0, rank=8)
    modules = [*IN_BLOCKS, OUTSIDE, low_rank]
    names = [module.name for module in modules]
    excluded = choose(modules, Patterns.checked([], [r"\.q$"], names))
    assert [left.cause for left in excluded.left_out].count(Cause.EXCLUDED) == 4
    assert Cause.LOW_RANK in [left.cause for left in excluded.left_out]
    assert not excluded.is_surprising  # a user who excludes a third knows it
    included = choose(modules, Patterns.checked(["stem", r"layers\.3"], [r"3\.v"], names))
    assert [module.name for module in included.assigned] == ["layers.3.q", "layers.3.k", "stem"]


@pytest.mark.parametrize(("prefix", "error"), [("--", UsageError), ("weight_decay.", ConfigError)])
def test_expressions_that_match_nothing_are_named_as_they_were_given(prefix: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{prefix}exclude 'nowhere' matches no module"):
        Patterns.checked([], ["nowhere"], ["a"], prefix=prefix, what="module", error=error)  # type: ignore[arg-type]


def test_assign_and_the_live_schedule_choose_alike() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({"q_proj": nn.Linear(64, 64), "up_proj": nn.Linear(64, 96)}) for _ in range(3)
    )
    for exclude in ((), ("q_proj",), (r"layers\.1",)):
        static = esdtool.assign(esdtool.analyze(model), exclude=exclude)
        optimizer = torch.optim.AdamW(model.parameters())
        live = esdtool.AlphaDecay(model, optimizer, exclude=exclude)
        assert set(live.last_decays) == set(static.parameters)
        assert dict(live.skipped) == static.left_out
