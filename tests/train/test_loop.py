"""Whole runs of seconds: what they learn, what they log, and that the batch may be split in any way."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from esdtool.errors import ConfigError
from esdtool.train import loop
from esdtool.train.data.open import open_data
from esdtool.train.loop import TrainingDivergedError, train
from esdtool.train.model import build_model

Config = Callable[..., Any]
Logs = Callable[[Path], tuple[list[dict[str, Any]], list[dict[str, Any]]]]


def test_the_loss_falls_below_unigram_entropy(make_config: Config, logs: Logs) -> None:
    config = make_config(
        schedule={"steps": 80, "warmup_steps": 5}, batch={"global_size": 8, "micro_size": 8}, eval={"every": 100}
    )
    result = train(config, quiet=True)
    batches = open_data(config).validation.micro_batches()
    labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in batches])
    counts = torch.bincount(labels[labels >= 0]).double()
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * shares.log()).sum())
    assert result.evaluation is not None
    assert result.evaluation.loss < entropy - 1
    metrics, _ = logs(result.run)
    assert metrics[0]["loss"] == pytest.approx(math.log(300), abs=0.3)
    assert metrics[-1]["split"] == "validation"
    assert metrics[-1]["perplexity"] == pytest.approx(math.exp(result.evaluation.loss))


def test_the_log_has_every_key_and_the_run_directory_every_file(make_config: Config) -> None:
    config = make_config(logging={"tensorboard": True})
    result = train(config, quiet=True)
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    keys = {"step", "tokens", "split", "loss", "perplexity", "lr", "grad_norm", "tokens_per_second"}
    assert all(set(line) == keys | {"weight_decay_mean"} for line in lines)
    trained = [line["step"] for line in lines if line["split"] == "train"]
    assert trained == [1, 2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if line["split"] == "validation"] == [4, 8, 12]
    assert lines[-1]["tokens"] == 12 * 4 * 32
    decays = [json.loads(line) for line in (result.run / "decay.jsonl").read_text().splitlines()]
    assert [line["step"] for line in decays] == [0, 5, 10]
    assert len(decays[0]["modules"]) == 14
    module = decays[0]["modules"]["model.layers.1.self_attn.q_proj"]
    assert set(module) == {"alpha", "weight_decay", "role", "layer"}
    assert (module["role"], module["layer"]) == ("q_proj", 1)
    assert list((result.run / "tensorboard").glob("events.out.tfevents.*"))
    for name in ("config.toml", "final/model.safetensors", "final/config.json", "final/tokenizer.json"):
        assert (result.run / name).is_file()


def test_decays_equal_an_independent_script_on_the_saved_weights(make_config: Config, logs: Logs) -> None:
    config = make_config(checkpoint={"every": 1, "keep": 50})
    run = train(config, quiet=True).run
    data = open_data(config)
    initial = build_model(config, vocab_size=data.vocab_size).state_dict()
    _, decays = logs(run)
    for line in decays:
        before = line["step"] - 1  # decays of update n come from the weights after n - 1 updates
        weights = initial
        if line["step"]:
            weights = load_file(run / "checkpoints" / f"step_{before:06d}" / "model.safetensors")
        alphas = {}
        for name in line["modules"]:
            values = np.sort(np.linalg.svd(weights[f"{name}.weight"].double().numpy(), compute_uv=False) ** 2)
            start = len(values) // 2
            tail = np.log(values[start:] / values[start])
            alphas[name] = 1 + len(tail) / tail.sum()
        low, high = min(alphas.values()), max(alphas.values())
        for name, alpha in alphas.items():
            expected = 0.1 * (0.67 + (alpha - low) / (high - low) * (5 - 0.67))
            assert line["modules"][name]["alpha"] == pytest.approx(alpha, rel=1e-6)
            assert line["modules"][name]["weight_decay"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("packing", ["dense", "document"])
def test_accumulation_is_exact(make_config: Config, logs: Logs, packing: str) -> None:
    losses = []
    for micro_size in (1, 2, 4):
        config = make_config(f"micro{micro_size}", data={"packing": packing}, batch={"micro_size": micro_size})
        metrics, _ = logs(train(config, quiet=True).run)
        losses.append([line["loss"] for line in metrics])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast"])
def test_low_precision_runs_and_keeps_its_dtype(make_config: Config, precision: str) -> None:
    result = train(make_config(precision={"name": precision}), quiet=True)
    weights = load_file(result.run / "final" / "model.safetensors")
    dtypes = {tensor.dtype for tensor in weights.values()}
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert result.evaluation is not None
    assert result.evaluation.loss < 5.5


def test_final_is_an_ordinary_checkpoint(make_config: Config) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from esdtool import analyze

    run = train(make_config(), quiet=True).run
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    ids = AutoTokenizer.from_pretrained(run / "final")("the cat", return_tensors="pt").input_ids
    assert model(ids).logits.shape[-1] == 300
    assert len(analyze(run / "final").scored) == 14
    assert len(analyze(run / "checkpoints" / "step_000010").scored) == 14


def test_it_goes_on_from_a_checkpoint_with_another_policy(make_config: Config, logs: Logs) -> None:
    first = train(make_config("first"), quiet=True)
    assert first.evaluation is not None
    config = make_config(
        "second", model={"from": str(first.run / "final")}, tokenizer={}, weight_decay={"policy": "uniform"}
    )
    metrics, _ = logs(train(config, quiet=True).run)
    assert metrics[0]["loss"] < 5
    assert metrics[-1]["loss"] < first.evaluation.loss


def test_a_nan_loss_stops_and_leaves_the_last_good_state(
    make_config: Config, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(make_config("whole"), quiet=True)
    calls = 0
    original = loop.summed_loss

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = original(*args, **kwargs)
        return loss * math.nan if calls == 2 * 6 + 1 else loss  # two micro-batches a step: in update 7

    config = make_config("poisoned")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "summed_loss", poisoned)
        with pytest.raises(TrainingDivergedError, match=r"step 7: the loss is nan .*step_000006; lower optimizer\.lr"):
            train(config, quiet=True)
    resumed = train(config, resume="auto", quiet=True)
    assert logs(resumed.run) == logs(whole.run)


def test_modules_that_cannot_be_scored_are_told(make_config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(make_config(weight_decay={"min_eigs": 65})).run
    said = [line for line in capsys.readouterr().err.splitlines() if "not scored" in line]
    assert said == [
        "esdtool: 14 of 14 modules are not scored, e.g. model.layers.0.self_attn.q_proj: "
        "base decay: too few eigenvalues: 64 < 65"
    ]
    line = json.loads((run / "decay.jsonl").read_text().splitlines()[-1])
    assert {module["weight_decay"] for module in line["modules"].values()} == {0.1}


def test_weights_and_biases_gets_the_same_numbers(
    make_config: Config, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, dict[str, float]]] = []

    class Session:
        def log(self, numbers: dict[str, float], step: int) -> None:
            logged.append((step, numbers))

        def finish(self) -> None:
            logged.append((-1, {}))

    fake = types.ModuleType("wandb")
    fake.init = lambda **options: Session()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    metrics, _ = logs(train(make_config(logging={"wandb": True}), quiet=True).run)
    validation = [(step, numbers["validation/loss"]) for step, numbers in logged if "validation/loss" in numbers]
    assert validation == [(line["step"], line["loss"]) for line in metrics if line["split"] == "validation"]
    assert any("alpha/q_proj" in numbers for _, numbers in logged)
    assert logged[-1] == (-1, {})


def test_a_used_run_directory_is_refused(make_config: Config) -> None:
    train(make_config(schedule={"steps": 1, "warmup_steps": 0}), quiet=True)
    with pytest.raises(ConfigError, match="already holds a run: go on with --resume auto"):
        train(make_config(schedule={"steps": 1, "warmup_steps": 0}), quiet=True)


def test_the_global_generator_and_threads_are_left_alone(make_config: Config) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(make_config(schedule={"steps": 1, "warmup_steps": 0}), quiet=True)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_activation_checkpointing_changes_nothing(make_config: Config, logs: Logs, model_config: str) -> None:
    plain = logs(train(make_config("plain"), quiet=True).run)
    config = make_config("saving", model={"config": model_config, "activation_checkpointing": True})
    saving = logs(train(config, quiet=True).run)
    assert [line["loss"] for line in saving[0]] == pytest.approx([line["loss"] for line in plain[0]], abs=1e-6)
