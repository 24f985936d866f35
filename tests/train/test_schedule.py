"""Learning rates: ends, peaks and transformers' own schedules."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from esdtool.train.schedule import lr_factor


def test_warm_up_is_linear_and_ends_at_the_peak(make_config: Callable[..., Any]) -> None:
    config = make_config(schedule={"steps": 50, "warmup_steps": 4})
    assert [lr_factor(config, step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_after_the_end_the_ratio_remains(make_config: Callable[..., Any], name: str, ratio: float) -> None:
    config = make_config(schedule={"steps": 50, "name": name, "min_lr_ratio": ratio})
    factors = [lr_factor(config, step) for step in range(51)]
    assert factors[50] == pytest.approx(ratio)
    assert max(factors) == 1
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[5:]))


def test_cosine_is_that_of_torch(make_config: Callable[..., Any]) -> None:
    config = make_config(schedule={"steps": 40, "warmup_steps": 0, "min_lr_ratio": 0.1})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.1)
    for step in range(40):
        assert lr_factor(config, step) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_wsd_is_flat_until_its_decay(make_config: Callable[..., Any]) -> None:
    config = make_config(schedule={"steps": 20, "name": "wsd", "warmup_steps": 2, "decay_steps": 4})
    factors = [lr_factor(config, step) for step in range(20)]
    assert factors[2:17] == [1.0] * 15
    assert factors[17:] == pytest.approx([1 - 0.9 * part / 4 for part in (1, 2, 3)])


def test_no_step_of_training_has_a_zero_rate(make_config: Callable[..., Any]) -> None:
    config = make_config(schedule={"steps": 1, "warmup_steps": 0})
    assert lr_factor(config, 0) == 1.0
