"""Warnings beside an assignment: random weights, and a mean decay away from the base."""

from __future__ import annotations

import logging
import math

import pytest
import torch

import esdtool
from esdtool.assignment.assign import assign
from esdtool.assignment.remarks import geometry_remark, mean_decay, total_remark
from esdtool.errors import UsageError
from tests.conftest import BUNDLED


def _weights(*, trained: bool) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(3):
        for role in ("up_proj", "gate_proj"):
            weight = torch.randn(128, 64, generator=draw)
            if trained:  # directions whose strengths follow a power law
                weight = weight * torch.arange(1, 65).float() ** -1.2
            tensors[f"model.layers.{layer}.mlp.{role}.weight"] = weight
    return tensors


def test_random_weights_are_called_geometry(caplog: pytest.LogCaptureFixture) -> None:
    analysis = esdtool.analyze(_weights(trained=False))
    with caplog.at_level(logging.WARNING):
        found = assign(analysis)
    assert "mostly geometry: 6 of 6 modules are like random" in caplog.text
    assert geometry_remark(analysis, found) in caplog.text
    caplog.clear()
    trained = esdtool.analyze(_weights(trained=True))
    assert geometry_remark(trained, assign(trained)) is None
    assert geometry_remark(analysis, assign(analysis, assign="uniform")) is None
    assert caplog.text == ""


def test_the_mean_decay_is_weighted_and_told_where_it_is_far_from_the_base() -> None:
    analysis = esdtool.analyze(BUNDLED)
    found = assign(analysis, weight_decay=0.1)
    sizes = {name: math.prod(entry.shape or ()) for name, entry in found.parameters.items()}
    total = sum(entry.weight_decay * sizes[name] for name, entry in found.parameters.items())
    assert mean_decay(found) == pytest.approx(total / sum(sizes.values()))
    assert "the mean decay is 0.216, 2.2 times the base of 0.1" in (total_remark(found) or "")
    assert total_remark(assign(analysis, normalize=True)) is None
    assert total_remark(assign(analysis, weight_decay=0.0)) is None


def test_python_is_not_told_of_options_of_the_command_line() -> None:
    analysis = esdtool.analyze(_weights(trained=True))
    left_out = assign(analysis, include=["up_proj"], exclude=["layers.0"]).left_out
    assert {reason.split()[0] for reason in left_out.values()} == {"not", "excluded"}
    assert "--" not in " ".join(left_out.values())
    with pytest.raises(UsageError, match="include") as raised:
        assign(analysis, include=["nowhere"])
    assert "--" not in str(raised.value)
