"""Learning-rate policies, cautious decay and the predicted base decay of a training run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from esdtool.errors import AssignmentError, ConfigError
from esdtool.optim import live_scores
from esdtool.train.base_decay import base_decay, explanation
from esdtool.train.cautious import CautiousDecay
from esdtool.train.dry_run import rehearse
from esdtool.train.loop import train
from esdtool.train.model import unallocated_model
from esdtool.train.optimizers import build_optimizers
from esdtool.train.power_lines import PowerLines

Config = Callable[..., Any]
LLR = {"policy": "llr", "interval": 2, "glide": 3, "fraction": 0.7}


def _lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "learning_rate.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_resumed_run_is_the_same_run(
    make_config: Config, logs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, beside AlphaDecay and with cautious decay, and both schedules share their spectra."""
    computed: list[int] = []
    original = live_scores.score_matrices
    monkeypatch.setattr(live_scores, "score_matrices", lambda *a, **k: (computed.append(1), original(*a, **k))[1])
    sections: dict[str, Any] = {
        "learning_rate": LLR,
        "weight_decay": {"interval": 4, "cautious": True},
        "eval": {"every": 100, "tokens": 100},
    }
    whole = train(make_config("whole", **sections), quiet=True).run
    # Looks at updates 0, 2, 4, 6, 8 for the rates and 0, 4, 8, 12 for the decays: 14 modules at 6 different ones.
    assert len(computed) == 6 * 14
    assert [line["step"] for line in _lines(whole)] == [0, 2, 4, 6, 8]
    resumed = train(
        make_config("resumed", **sections), resume=str(whole / "checkpoints" / "step_000005"), quiet=True
    ).run
    assert _lines(resumed) == [line for line in _lines(whole) if line["step"] > 5]
    assert logs(resumed)[0] == [line for line in logs(whole)[0] if line["step"] > 5]
    one, other = (load_file(run / "final" / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)

    last = _lines(whole)[-1]["modules"]
    assert (last["lm_head"]["ratio"], last["model.embed_tokens"]["ratio"]) == (5.0, 5.0)
    assert min(each["ratio"] for each in last.values()) == 1.0
    assert logs(whole)[0][-1]["lr_ratio_mean"] == pytest.approx(_mean_ratio(last, one))
    with pytest.raises(ConfigError, match=r"cannot resume: learning_rate\.policy \(llr then, tempbalance now\)"):
        train(
            make_config("other", **{**sections, "learning_rate": {"policy": "tempbalance"}}),
            resume=str(whole / "checkpoints" / "step_000005"),
            quiet=True,
        )


def _mean_ratio(modules: dict[str, Any], weights: dict[str, torch.Tensor]) -> float:
    ratios = [modules.get(name.removesuffix(".weight"), {"ratio": 1.0})["ratio"] for name in weights]
    return float(np.average(ratios, weights=[weight.numel() for weight in weights.values()]))


def _problem(seed: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon])
def test_cautious_decay(kind: Any) -> None:
    """x - lr (u + decay [u x >= 0] x), with u from the same optimizer without decay, or from AdamW's formula."""
    parameter, twin = _problem(0), _problem(0)
    optimizer, plain = kind([parameter], lr=0.1, weight_decay=0.3), kind([twin], lr=0.1, weight_decay=0.0)
    CautiousDecay([optimizer])
    first = second = np.zeros((6, 5))
    for step in range(1, 5):
        gradient = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        before = parameter.detach().clone()
        with torch.no_grad():
            twin.copy_(before)
        parameter.grad, twin.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        plain.step()
        x, g = before.double().numpy(), gradient.double().numpy()
        update = (x - twin.detach().double().numpy()) / 0.1
        if kind is torch.optim.AdamW:
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            update = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        expected = x - 0.1 * (update + 0.3 * (update * x >= 0) * x)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
        assert 0 < (update * x >= 0).sum() < x.size
        assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_power_lines_by_hand() -> None:
    """1B parameters at 20 tokens each, 2 million tokens a step: tau = 1.084 / 20^0.527 = 0.2236, in 10,000 steps."""
    law = PowerLines(parameters=10**9, tokens=20 * 10**9, batch_tokens=2 * 10**6, lr=1e-3)
    assert law.tau == pytest.approx(0.2236, rel=1e-3)
    assert law.base == pytest.approx(1 / (1e-3 * 0.2236 * 10_000), rel=1e-3)
    assert (
        "= 20, tau = 1.084 x 20^-0.527 = 0.2236, base = 2,000,000 / (0.001 x 0.2236 x 20,000,000,000)"
        in law.explanation
    )


@pytest.mark.parametrize("parameters", [110_000_000, 3_400_000_000])
def test_power_lines_outside_the_models_of_the_paper(parameters: int) -> None:
    with pytest.raises(ConfigError, match=r"fitted on models of 111,000,000 to 3,300,000,000 parameters, and this one"):
        PowerLines(parameters=parameters, tokens=10**10, batch_tokens=10**6, lr=1e-3)


def test_power_lines_with_too_few_tokens() -> None:
    with pytest.raises(ConfigError, match="1,000,000,000 tokens are 1 per parameter"):
        PowerLines(parameters=10**9, tokens=10**9, batch_tokens=10**6, lr=1e-3)


def test_a_predicted_base(settings: Config, make_config: Config) -> None:
    """The law's for the model at hand, said in words, and refused for a small model before anything is trained."""
    large = settings(
        model={"preset": "llama-130m"},
        schedule={"steps": 20_000},
        batch={"global_size": 512, "micro_size": 64, "sequence_length": 256},
        weight_decay={"policy": "uniform", "base": "power-lines"},
    )
    model = unallocated_model(large, vocab_size=32_000)
    tau = 1.084 * (512 * 256 * 20_000 / sum(each.numel() for each in model.parameters())) ** -0.527
    base = base_decay(large, model)
    assert base == pytest.approx(1 / (1e-3 * tau * 20_000))
    assert {group["weight_decay"] for group in build_optimizers(model, large, [])[0].param_groups} == {base}
    assert str(explanation(large, model)).startswith(
        f"weight_decay.base = {base:.4g} by power-lines (arXiv 2505.13738)"
    )
    small = make_config(weight_decay={"base": "power-lines"})
    for refuse in (rehearse, lambda config: train(config, quiet=True)):
        with pytest.raises(ConfigError, match="the law was fitted on models of"):
            refuse(small)
    assert not Path(small.run_dir).exists()


def test_rates_of_a_file(make_config: Config, tmp_path: Path) -> None:
    """The ratios of `assign --for learning-rate` multiply the schedule for the whole run; other files are refused."""
    path = tmp_path / "rates.json"
    names = {"model.layers.0.self_attn.q_proj.weight": 3.0, "lm_head.weight": 5.0}
    document = {
        "format": "esdtool.weight_decay",
        "version": 2,
        "quantities": {"learning-rate": {"key": "lr_ratio", "method": "llr"}},
        "parameters": {name: {"lr_ratio": ratio} for name, ratio in names.items()},
    }
    path.write_text(json.dumps(document))
    sections = {"learning_rate": {"policy": "file", "path": str(path)}, "weight_decay": {"policy": "uniform"}}
    found = train(make_config("file", schedule={"steps": 3, "warmup_steps": 0}, **sections), quiet=True).run
    (line,) = _lines(found)
    assert {f"{name}.weight": module["ratio"] for name, module in line["modules"].items()} == names
    rehearse(make_config("again", **sections))
    document["parameters"] = {"lm_head.weight": {"lr_ratio": 5.0, "shape": [1, 1]}}
    path.write_text(json.dumps(document))
    with pytest.raises(AssignmentError, match=rf"^{re.escape(str(path))}: lm_head.weight: shape .* another model"):
        rehearse(make_config("misfit", **sections))
    document["parameters"] = {"lm_head.weight": {"train": True}}
    path.write_text(json.dumps(document))
    with pytest.raises(AssignmentError, match="holds no learning rates; make it with"):
        rehearse(make_config("other", **sections))


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": {"policy": "best"}}, "\"best\", but should be 'uniform', 'llr', 'tempbalance' or 'file'"),
    ({"learning_rate": {"interval": 5}}, 'belongs to learning_rate.policy = "llr" or "tempbalance"'),
    ({"learning_rate": {"policy": "llr", "delay": 100}}, "delay 100 is not less than learning_rate.interval 100"),
    ({"learning_rate": {"policy": "llr", "max_ratio": 0.5}}, "min_ratio 1.0 is more than learning_rate.max_ratio 0.5"),
    ({"learning_rate": {"policy": "llr", "fraction": 0}}, "learning_rate.fraction is 0, but should be greater than 0"),
    ({"weight_decay": {"base": "power"}}, 'weight_decay.base is the string "power"'),
    ({"weight_decay": {"cautious": True}, "optimizer": {"name": "adam"}}, 'not "adam"'),
    ({"weight_decay": {"base": "power-lines"}, "optimizer": {"name": "muon"}}, 'a law of AdamW, not of "muon"'),
    (
        {"weight_decay": {"policy": "adadecay", "adadecay_rule": "parameter", "cautious": True}},
        "cautious does not reach the decays of",
    ),
]


@pytest.mark.parametrize(("sections", "message"), REJECTED, ids=str)
def test_rejected(settings: Config, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**sections)
    assert message in str(caught.value)
