"""Each policy against a training loop written out by hand with torch alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from esdtool.errors import AssignmentError, ConfigError
from esdtool.train.data.open import open_data
from esdtool.train.loop import train
from esdtool.train.model import build_model

Config = Callable[..., Any]
STEPS = 8
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def hill(weight: torch.Tensor) -> float:
    values = np.sort(np.linalg.svd(weight.detach().double().numpy(), compute_uv=False) ** 2)
    tail = np.log(values[len(values) // 2 :] / values[len(values) // 2])
    return float(1 + len(tail) / tail.sum())


def by_hand(
    config: Any, decide: Callable[[int, dict[str, Any], dict[str, Any]], None], kind: type = torch.optim.AdamW
) -> Any:
    """Train with plain torch; `decide(update from 0, groups by parameter name, parameters)` sets the decays."""
    data = open_data(config)
    model = build_model(config, vocab_size=data.vocab_size)
    parameters = dict(model.named_parameters())
    groups = {name: {"params": [parameter]} for name, parameter in parameters.items()}
    optimizer = kind(list(groups.values()), lr=config.optimizer.lr, betas=config.optimizer.betas, weight_decay=0.1)
    groups = dict(zip(parameters, optimizer.param_groups, strict=True))
    for update in range(STEPS):
        progress = (update - 2) / (STEPS - 2)
        factor = (update + 1) / 3 if update < 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        rows = [batch["input_ids"] for batch in data.train.micro_batches(update)]
        logits = model(torch.cat(rows), use_cache=False).logits
        targets = torch.cat(rows)[:, 1:]
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
        if config.optimizer.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        for group in groups.values():
            group["lr"] = config.optimizer.lr * factor
        decide(update, groups, parameters)
        optimizer.step()
        optimizer.zero_grad()
    return model


def check(config: Any, model: Any) -> None:
    """The loop's final weights are those of the loop by hand, up to the rounding of other orders of summation."""
    saved = load_file(train(config, quiet=True).run / "final" / "model.safetensors")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(
            saved[name], weight, rtol=2e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def is_module(name: str) -> bool:
    return any(f".{role}." in name for role in ROLES)


@pytest.fixture
def config_of(make_config: Config) -> Config:
    def make(**sections: dict[str, Any]) -> Any:
        return make_config(
            schedule={"steps": STEPS, "warmup_steps": 2},
            **({"weight_decay": {}} | sections),
        )

    return make


@pytest.mark.parametrize("unlisted", ["keep", "no-decay"])
@pytest.mark.parametrize(("policy", "value"), [("uniform", 2.0), ("none", 0.0)])
def test_uniform_and_none(config_of: Config, policy: str, value: float, unlisted: str) -> None:
    config = config_of(weight_decay={"policy": policy, "base": 2.0, "unlisted": unlisted})

    def decide(update: int, groups: dict[str, Any], parameters: dict[str, Any]) -> None:
        for name, group in groups.items():
            group["weight_decay"] = value if unlisted == "keep" or is_module(name) else 0.0

    check(config, by_hand(config, decide))


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_alphadecay(config_of: Config, name: str) -> None:
    base, maximum, kind = {"adamw": (1.0, 5, torch.optim.AdamW), "adam": (1e-2, 3, torch.optim.Adam)}[name]
    config = config_of(optimizer={"name": name}, weight_decay={"base": base, "interval": 3})

    def decide(update: int, groups: dict[str, Any], parameters: dict[str, Any]) -> None:
        for group in groups.values():
            group.setdefault("chosen", base)
        if update == 0 or (update + 1) % 3 == 0:
            alphas = {name: hill(weight) for name, weight in parameters.items() if is_module(name)}
            low, high = min(alphas.values()), max(alphas.values())
            for name, alpha in alphas.items():
                groups[name]["chosen"] = base * (0.67 + (alpha - low) / (high - low) * (maximum - 0.67))
        for group in groups.values():
            group["weight_decay"] = group["chosen"]

    check(config, by_hand(config, decide, kind))


def test_awd(config_of: Config) -> None:
    config = config_of(optimizer={"max_grad_norm": 0.5}, weight_decay={"policy": "awd", "base": 0.1})
    mean = 0.0

    def decide(update: int, groups: dict[str, Any], parameters: dict[str, Any]) -> None:
        nonlocal mean
        gradient = torch.cat([weight.grad.flatten() for weight in parameters.values()]).norm().item()
        size = torch.cat([weight.detach().flatten() for weight in parameters.values()]).norm().item()
        mean = 0.1 * mean + 0.9 * (100 * 0.1 * gradient / size)
        for group in groups.values():
            group["weight_decay"] = mean

    check(config, by_hand(config, decide))
    assert mean > 0


def test_adadecay_by_module(config_of: Config) -> None:
    config = config_of(weight_decay={"policy": "adadecay", "base": 1.0})

    def decide(update: int, groups: dict[str, Any], parameters: dict[str, Any]) -> None:
        for group in groups.values():
            group["weight_decay"] = 1.0
        for layer in range(2):
            names = [name for name in parameters if f"layers.{layer}." in name and is_module(name)]
            norms = np.array([parameters[name].grad.norm().item() for name in names])
            for name, z in zip(names, (norms - norms.mean()) / norms.std(), strict=True):
                groups[name]["weight_decay"] = 2 / (1 + math.exp(-4 * z))

    check(config, by_hand(config, decide))


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_adadecay_by_parameter(config_of: Config, name: str) -> None:
    base = {"adamw": 1.0, "adam": 1e-2}[name]
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name]
    config = config_of(
        optimizer={"name": name}, weight_decay={"policy": "adadecay", "adadecay_rule": "parameter", "base": base}
    )

    def decide(update: int, groups: dict[str, Any], parameters: dict[str, Any]) -> None:
        for each, weight in parameters.items():
            groups[each]["weight_decay"] = 0.0 if is_module(each) else base
            if is_module(each):
                size = weight.grad.abs()
                theta = 2 / (1 + torch.exp(-4 * (size - size.mean()) / size.std(correction=0)))
                if name == "adam":
                    weight.grad += base * theta * weight.detach()
                else:
                    weight.data -= groups[each]["lr"] * base * theta * weight.data

    check(config, by_hand(config, decide, kind))


def test_file(config_of: Config, tmp_path: Path, model_config: str) -> None:
    from esdtool import analyze, assign

    probe = config_of()
    model = build_model(probe, vocab_size=300)
    assignment = assign(analyze(model), weight_decay=1.0)
    path = tmp_path / "wd.json"
    assignment.save(path)
    config = config_of(weight_decay={"policy": "file", "path": str(path), "base": 0.5})

    def decide(update: int, groups: dict[str, Any], parameters: dict[str, Any]) -> None:
        for name, group in groups.items():
            entry = assignment.parameters.get(name)
            group["weight_decay"] = 0.5 if entry is None else entry.weight_decay

    check(config, by_hand(config, decide))


def test_a_file_for_the_other_kind_of_decay_is_refused(config_of: Config, tmp_path: Path) -> None:
    from esdtool import analyze, assign

    path = tmp_path / "wd.json"
    assign(analyze(build_model(config_of(), vocab_size=300)), optimizer="adam", weight_decay=1e-5).save(path)
    with pytest.raises(ConfigError, match=r'are for "l2" weight decay, but optimizer\.name "adamw"'):
        train(config_of(weight_decay={"policy": "file", "path": str(path)}), quiet=True)
    with pytest.raises(AssignmentError, match=r"nowhere\.json"):
        train(
            config_of(weight_decay={"policy": "file", "path": str(tmp_path / "nowhere.json")}),
            quiet=True,
        )


def test_include_and_exclude_speak_of_module_names(config_of: Config, logs: Callable[[Path], Any]) -> None:
    excluded = r"^model\.layers\.0\.self_attn\.q_proj$"
    _, decays = logs(train(config_of(weight_decay={"exclude": [excluded]}), quiet=True).run)
    assert len(decays[0]["modules"]) == 13
    assert "model.layers.0.self_attn.q_proj" not in decays[0]["modules"]


def test_a_pattern_that_matches_nothing_is_refused(config_of: Config) -> None:
    with pytest.raises(
        ConfigError, match=r"weight_decay\.exclude 'layer9' matches no module; names look like: .*model\."
    ):
        train(config_of(weight_decay={"exclude": ["layer9"]}), quiet=True)


def test_muon_takes_the_matrices_of_the_blocks(config_of: Config) -> None:
    from esdtool.train.optimizers import build_optimizers, scored_modules

    config = config_of(optimizer={"name": "muon", "muon_lr": 2e-2})
    model = build_model(config, vocab_size=300)
    muon, adamw = build_optimizers(model, config, scored_modules(model, config))
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert muon.param_groups[0]["lr"] == 2e-2
    in_muon = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in in_muon} == {
        name for name, _ in model.named_parameters() if is_module(name)
    }


def test_gradient_norm_scores_begin_with_the_base(config_of: Config, logs: Callable[[Path], Any]) -> None:
    config = config_of(weight_decay={"score": "gradient_norm", "interval": 4})
    _, decays = logs(train(config, quiet=True).run)
    assert {module["weight_decay"] for module in decays[0]["modules"].values()} == {0.1}
    assert [line["step"] for line in decays] == [0, 4, 8]
    last = decays[-1]["modules"].values()
    assert min(module["weight_decay"] for module in last) == pytest.approx(0.067)
    assert max(module["weight_decay"] for module in last) == pytest.approx(0.5)
    assert all(module["score"] > 0 and module["alpha"] is None for module in last)


def test_llr(config_of: Config) -> None:
    """Looks at the start and at update 3, the last in half of the run; lines of two updates; the ends at the top."""
    config = config_of(
        weight_decay={"policy": "uniform", "base": 0.5},
        learning_rate={"policy": "llr", "interval": 3, "glide": 2, "fraction": 0.5},
    )
    line: dict[str, Any] = {}

    def decide(update: int, groups: dict[str, Any], parameters: dict[str, Any]) -> None:
        if update in (0, 2):
            alphas = {name: hill(value) for name, value in parameters.items() if is_module(name)}
            low, high = min(alphas.values()), max(alphas.values())
            target = {name: float(np.interp(alpha, [low, high], [1.0, 5.0])) for name, alpha in alphas.items()}
            target |= {"model.embed_tokens.weight": 5.0, "lm_head.weight": 5.0}
            line.update(start=line.get("target", dict.fromkeys(target, 1.0)), target=target, since=update)
        done = min(1.0, (update - line["since"] + 1) / 2)
        for name, group in groups.items():
            group["weight_decay"] = 0.5
            start, target = (line[what].get(name, 1.0) for what in ("start", "target"))
            group["lr"] *= start + done * (target - start)

    check(config, by_hand(config, decide))
