"""The mean of the last weights: what it is the mean of, and that evaluating it leaves the run as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from esdtool.train.evaluate import EvalRequest, evaluate_checkpoint
from esdtool.train.loop import train

Config = Callable[..., Any]
Logs = Callable[[Path], tuple[list[dict[str, Any]], list[dict[str, Any]]]]


def test_it_is_the_mean_of_the_checkpoints_and_changes_nothing(make_config: Config, logs: Logs) -> None:
    every = {"checkpoint": {"every": 1, "keep": 20}}
    plain = train(make_config("plain", **every), quiet=True).run
    config = make_config("averaged", **every, eval={"average": 0.33})  # the last 4 of 12 steps
    run = train(config, quiet=True).run
    assert (run / "final/model.safetensors").read_bytes() == (plain / "final/model.safetensors").read_bytes()
    *same, line = logs(run)[0]
    assert same == logs(plain)[0]
    assert (line["split"], line["step"], line["averaged_steps"]) == ("averaged", 12, 4)

    folder = run / "final"
    last = [load_file(run / f"checkpoints/step_{step:06d}/model.safetensors") for step in range(9, 13)]
    mean = {name: torch.stack([weights[name] for weights in last]).mean(0) for name in last[0]}
    save_file(mean, folder / "model.safetensors", metadata={"format": "pt"})
    evaluation = evaluate_checkpoint(EvalRequest.of_run(str(folder), config))
    assert line["loss"] == pytest.approx(evaluation.loss, abs=1e-6)
    assert line["loss"] != pytest.approx(same[-1]["loss"], abs=1e-5)


def test_low_precision_weights_are_averaged_in_float32() -> None:
    from esdtool.train.average import WeightAverage

    model = torch.nn.Linear(3, 2).bfloat16()
    average = WeightAverage(model, first_step=1)
    history = []
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.add_(0.01 * step)
        history.append(model.weight.detach().float())
        average.update(step)
    now = model.weight.detach().clone()
    with average.in_place():
        assert torch.equal(model.weight, torch.stack(history).mean(0).bfloat16())
    assert torch.equal(model.weight, now)
