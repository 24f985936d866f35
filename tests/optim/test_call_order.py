"""A schedule that is stepped after the optimizer, or never, says so once; one that is stepped before says nothing."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from esdtool import AlphaDecay


def _training() -> tuple[nn.Module, torch.optim.AdamW, AlphaDecay]:
    torch.manual_seed(0)
    block = nn.ModuleDict({"up_proj": nn.Linear(64, 64, bias=False), "down_proj": nn.Linear(64, 64, bias=False)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, optimizer, AlphaDecay(model, optimizer, weight_decay=0.1, interval=100)


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ("soso", []),
        ("osososo", ["AlphaDecay.step() was called after optimizer.step()"]),
        ("oooo", ["the optimizer has made 2 updates, and AlphaDecay.step() was not called"]),
        ("o", []),
        ("ssoso", []),
    ],
)
def test_the_order_of_calls(calls: str, words: list[str], caplog: pytest.LogCaptureFixture) -> None:
    _, optimizer, schedule = _training()
    with caplog.at_level(logging.WARNING):
        for call in calls:
            (schedule if call == "s" else optimizer).step()
    assert len(caplog.records) == len(words)
    for record, expected in zip(caplog.records, words, strict=True):
        assert record.getMessage().startswith(expected)


def test_a_closed_schedule_leaves_the_optimizer_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    _, optimizer, schedule = _training()
    schedule.close()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            optimizer.step()
    assert caplog.records == []


def test_optimizers_are_copied_and_pickled_as_before() -> None:
    _, optimizer, schedule = _training()
    assert schedule is not None
    assert copy.deepcopy(optimizer).state_dict() == pickle.loads(pickle.dumps(optimizer)).state_dict()
