"""Every form of an assignment, read as its reader reads it: by the library, or by its rules restated here."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import types
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
import torch
import yaml
from torch import nn

from esdtool.assignment.allocation import Allocation, ParameterValues, QuantityRecord, ValueDetail
from esdtool.assignment.document import Default
from esdtool.assignment.formats import FORMAT_NAMES
from esdtool.assignment.options import AssignmentFormat
from esdtool.assignment.writer import WriteOptions, load_writer, write_as
from esdtool.errors import UsageError

HOW = WriteOptions(command="esdtool assign model --for learning-rate", learning_rate=0.001)

NAMES = [f"model.layers.{layer}.{role}.weight" for layer in (0, 1, 10) for role in ("self_attn.q_proj", "mlp.up_proj")]
RATIOS = [1.0, 2.5, 2.5, 0.1 + 0.2, 1e-7, 4.0]
OTHERS = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "x.model.layers.0.self_attn.q_proj.weight",
    "lm_head.weight",
]


class Model(nn.Module):
    """Linear layers under the names above and others that look alike."""

    def __init__(self) -> None:
        super().__init__()
        for name in [*NAMES, *OTHERS]:
            parent: nn.Module = self
            *path, leaf, _ = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(leaf, nn.Linear(8, 8, bias=False))


def allocation(**values: list[Any]) -> Allocation:
    """Values by key for `NAMES`, in order; the ratio of a weight decay is ten times its value."""
    parameters = {}
    for index, name in enumerate(NAMES):
        own = {key: column[index] for key, column in values.items()}
        details = {
            key: ValueDetail(ratio=value * 10 if key == "weight_decay" else None, score=float(index))
            for key, value in own.items()
        }
        role, layer = name.split(".")[-2], int(name.split(".")[2])
        parameters[name] = ParameterValues(**own, details=details, role=role, layer=layer, shape=(8, 8))
    quantities = {key: QuantityRecord(key=key, method="test") for key in values}
    base = 0.1 if "weight_decay" in values else None
    return Allocation(base_weight_decay=base, quantities=quantities, parameters=parameters)


BOTH = allocation(lr_ratio=RATIOS, weight_decay=[ratio / 5 for ratio in RATIOS])


def first_match(patterns: list[str], name: str) -> int | None:
    """The rule of torchtitan, NeMo and fairseq2: `re.search`, the first pattern that matches."""
    return next((index for index, pattern in enumerate(patterns) if re.search(pattern, name)), None)


def test_names_of_formats() -> None:
    assert sorted(get_args(AssignmentFormat)) == sorted(FORMAT_NAMES)
    assert all(load_writer(name).reader for name in FORMAT_NAMES)


def test_nemo() -> None:
    text = write_as("nemo", BOTH, HOW)
    assert text.splitlines()[0] == "# esdtool assign model --for learning-rate"
    overrides = yaml.safe_load(text)["param_group_overrides"]
    assert len(overrides) == len(set(RATIOS))  # equal values are collapsed
    for name, ratio in zip(NAMES, RATIOS, strict=True):
        index = first_match([override["pattern"] for override in overrides], name)
        assert index is not None
        assert overrides[index]["lr_mult"] == ratio
        assert overrides[index]["wd_mult"] == ratio / 5 * 10
    assert all(first_match([override["pattern"] for override in overrides], name) is None for name in OTHERS)


@dataclass(kw_only=True)
class ParamGroupConfig:
    """The fields of torchtitan's class of this name."""

    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)


def test_torchtitan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grouping of `OptimizersContainer._build_param_groups`: every pattern must match something new."""
    for name in ("torchtitan", "torchtitan.components", "torchtitan.components.optimizer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torchtitan.components.optimizer"].ParamGroupConfig = ParamGroupConfig  # type: ignore[attr-defined]
    namespace: dict[str, Any] = {}
    exec(write_as("torchtitan", BOTH, HOW), namespace)
    groups = namespace["param_groups"](lr=0.001, weight_decay=0.1, betas=(0.9, 0.95))
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        new = [n for n, _ in Model().named_parameters() if n not in found and re.search(group.pattern, n)]
        assert new, group.pattern
        found |= dict.fromkeys(new, group.optimizer_kwargs)
    for name, ratio in zip(NAMES, RATIOS, strict=True):
        assert found[name]["lr"] == pytest.approx(0.001 * ratio)
        assert found[name]["weight_decay"] == pytest.approx(ratio / 5)
    assert all((found[name]["lr"], found[name]["weight_decay"]) == (0.001, 0.1) for name in OTHERS)
    assert all(kwargs["betas"] == (0.9, 0.95) for kwargs in found.values())


def test_fairseq2() -> None:
    config = yaml.safe_load(write_as("fairseq2", BOTH, HOW))["optimizer"]["config"]
    assert config["lr"] == 0.001
    patterns = [group["params"] for group in config["groups"]]
    for name, ratio in zip(NAMES, RATIOS, strict=True):
        index = first_match(patterns, name)
        assert index is not None
        assert config["groups"][index]["lr"] == pytest.approx(0.001 * ratio)
        assert config["groups"][index]["weight_decay"] == pytest.approx(ratio / 5)
    assert all(first_match(patterns, name) is None for name in OTHERS)


def test_no_decay_for_what_is_not_listed_reaches_every_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding has a learning rate and no decay of its own; norms have neither."""
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    parameters = BOTH.parameters | {embedding: ParameterValues(lr_ratio=5.0)}
    default = Default.of("no-decay", 0.1)
    document = BOTH.model_copy(update={"parameters": parameters, "default": default})

    overrides = yaml.safe_load(write_as("nemo", document, HOW))["param_group_overrides"]
    for name, lr in ((embedding, 5.0), (norm, 1.0)):
        index = first_match([override["pattern"] for override in overrides], name)
        assert index is not None
        assert (overrides[index]["lr_mult"], overrides[index]["wd_mult"]) == (lr, 0.0)

    monkeypatch.setitem(sys.modules, "torchtitan", types.ModuleType("torchtitan"))
    for name in ("torchtitan.components", "torchtitan.components.optimizer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torchtitan.components.optimizer"].ParamGroupConfig = ParamGroupConfig  # type: ignore[attr-defined]
    namespace: dict[str, Any] = {}
    exec(write_as("torchtitan", document, HOW), namespace)
    groups = namespace["param_groups"](lr=0.001, weight_decay=0.1)
    for name, lr in ((embedding, 0.005), (norm, 0.001)):
        index = first_match([group.pattern for group in groups], name)
        assert index is not None
        assert groups[index].optimizer_kwargs == {"lr": lr, "weight_decay": 0.0}

    assert yaml.safe_load(write_as("fairseq2", document, HOW))["optimizer"]["config"]["weight_decay"] == 0.0
    ends = [group for group in json.loads(write_as("torch-groups", document, HOW)) if embedding in group["params"]]
    assert ends == [{"weight_decay": 0.0, "lr_ratio": 5.0, "params": [embedding]}]


def axolotl_rate(config: dict[str, Any], name: str) -> float:
    """The rule of `create_optimizer_grouped_parameters` in axolotl @ 067b021."""
    if any(end in name for end in ("embed_tokens", "lm_head")):
        return config.get("embedding_lr", config["learning_rate"])  # type: ignore[no-any-return]
    lookup = {module: group["lr"] for group in config["lr_groups"] for module in group["modules"]}
    return next((lr for module, lr in lookup.items() if module in name), config["learning_rate"])  # type: ignore[no-any-return]


def test_axolotl_learning_rates() -> None:
    document = allocation(lr_ratio=RATIOS)
    ends = {name: ParameterValues(lr_ratio=5.0) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    document = document.model_copy(update={"parameters": document.parameters | ends})
    config = yaml.safe_load(write_as("axolotl", document, HOW))
    for name, ratio in zip(NAMES, RATIOS, strict=True):
        assert axolotl_rate(config, name) == pytest.approx(0.001 * ratio)
    assert axolotl_rate(config, "lm_head.weight") == 0.005
    assert axolotl_rate(config, "model.norm.weight") == 0.001


def axolotl_unfrozen(patterns: list[str], names: list[str]) -> set[str]:
    """The rule of `freeze_layers_except`: dots are escaped there, and `re.match` starts at the first character."""
    compiled = [re.compile(re.sub(r"\.(?!\+)", "\\.", pattern)) for pattern in patterns]
    return {name for name in names if any(pattern.match(name) for pattern in compiled)}


@pytest.mark.parametrize("name", ["axolotl", "spectrum-yaml"])
def test_layers_to_train(name: str) -> None:
    trained = [True, False, True, True, False, False]
    text = write_as(name, allocation(train=trained), HOW)
    found = axolotl_unfrozen(yaml.safe_load(text)["unfrozen_parameters"], [*NAMES, *OTHERS])
    assert found == {name for name, is_trained in zip(NAMES, trained, strict=True) if is_trained}


@pytest.mark.parametrize("name", ["axolotl", "spectrum-yaml"])
@pytest.mark.parametrize("strange", ["a+b.0.f(x).weight", "my proj$ #1: x.weight", "a|b.weight", "a[0]*.weight"])
def test_strange_names_to_train(name: str, strange: str) -> None:
    entries = {strange: ParameterValues(train=True)}
    document = allocation(train=[True] * 6).model_copy(update={"parameters": entries})
    patterns = yaml.safe_load(write_as(name, document, HOW))["unfrozen_parameters"]
    assert axolotl_unfrozen(patterns, [strange, f"{strange}x", f"x.{strange}", "a", "b.weight", "aab.0.fx.weight"]) == {
        strange
    }


def test_spectrum_json_lets_axolotl_choose_the_same() -> None:
    """The choice of `_generate_unfrozen_params_yaml`: in each type the int(count * fraction) largest scores."""
    scores = json.loads(write_as("spectrum-json", allocation(train=[True] * 6), HOW))
    assert scores["model.layers.0.self_attn.q_proj"] == {"snr": 0.0, "type": "self_attn.q_proj"}
    kinds: dict[str, list[tuple[float, str]]] = {}
    for module, entry in scores.items():
        kinds.setdefault(entry["type"], []).append((entry["snr"], module))
    best = [module for held in kinds.values() for _, module in sorted(held, reverse=True)[: int(len(held) * 0.5)]]
    assert best == ["model.layers.10.self_attn.q_proj", "model.layers.10.mlp.up_proj"]
    assert axolotl_unfrozen(best, NAMES) == {f"{module}.weight" for module in best}


def test_peft() -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    ranks = [8, 8, 3, 5, 0, 8]
    config = json.loads(write_as("peft", allocation(rank=ranks), HOW))
    assert config.pop("peft_type") == "LORA"
    model = get_peft_model(Model(), LoraConfig(**config))
    found = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    expected = {name.removesuffix(".weight"): rank for name, rank in zip(NAMES, ranks, strict=True) if rank}
    looks_alike = "x.model.layers.0.self_attn.q_proj"
    # peft takes a target's name as the end of names, which nobody can anchor.
    assert {name: rank for name, (rank, _) in found.items() if name != looks_alike} == expected
    assert {scale for _, scale in found.values()} == {2.0}


def test_peft_with_targets_alone() -> None:
    config = json.loads(write_as("peft", allocation(lora_target=[True, False, False, True, False, False]), HOW))
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    with pytest.raises(UsageError, match="no module is left"):
        write_as("peft", allocation(lora_target=[False] * 6), HOW)


def test_llama_quantize() -> None:
    """llama.cpp: one pattern=type at each white space, `std::regex_search`, the first that matches."""
    text = write_as("llama-quantize", allocation(bits=[2, 4, 4, 3, 8, 2]), HOW)
    rules = [entry.rsplit("=", 1) for entry in text.split()]
    assert len(rules) == 4
    tensors = [f"blk.{layer}.{name}.weight" for layer in (0, 1, 10) for name in ("attn_q", "ffn_up")]
    found = [next(kind for pattern, kind in rules if re.search(pattern, tensor)) for tensor in tensors]
    assert found == ["q2_k", "q4_k", "q4_k", "q3_k", "q8_0", "q2_k"]
    assert not any(re.search(pattern, "blk.100.attn_q.weight") for pattern, _ in rules)
    with pytest.raises(UsageError, match=r"no type of 7 bits; choose widths from 1, 2, 3"):
        write_as("llama-quantize", allocation(bits=[7] * 6), HOW)


def test_torch_groups_and_csv() -> None:
    groups = json.loads(write_as("torch-groups", BOTH, HOW))
    assert {name: group["lr_ratio"] for group in groups for name in group["params"]} == dict(
        zip(NAMES, RATIOS, strict=True)
    )
    rows = list(csv.DictReader(io.StringIO(write_as("csv", BOTH, HOW))))
    assert [float(row["lr_ratio"]) for row in rows] == RATIOS
    assert [float(row["weight_decay.score"]) for row in rows] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_what_a_format_cannot_carry_is_refused_by_name(name: str) -> None:
    whole = allocation(lr_ratio=RATIOS, bits=[4] * 6)
    if {"lr_ratio", "bits"} <= load_writer(name).carries:
        assert name in ("json", "csv")
        return
    with pytest.raises(UsageError, match=rf"the format {name} cannot carry .*; choose from csv, json$"):
        write_as(name, whole, HOW)


def test_other_refusals() -> None:
    with pytest.raises(UsageError, match="axolotl cannot carry weight decays: its lr_groups know learning rates only"):
        write_as("axolotl", BOTH, HOW)
    with pytest.raises(UsageError, match="unknown format 'nonsense'; choose from axolotl"):
        write_as("nonsense", BOTH, HOW)
    for name in ("axolotl", "fairseq2"):
        with pytest.raises(UsageError, match=f"{name} reads absolute learning rates: .*--learning-rate"):
            write_as(name, allocation(lr_ratio=RATIOS), WriteOptions())
    inner, outer = "a.weight", "b.a.weight"
    entries = {inner: ParameterValues(lr_ratio=1.0), outer: ParameterValues(lr_ratio=2.0)}
    conflicting = allocation(lr_ratio=RATIOS).model_copy(update={"parameters": entries})
    with pytest.raises(UsageError, match=r"a\.weight as a part of names, and b\.a\.weight contains it"):
        write_as("axolotl", conflicting, HOW)


def test_a_command_cannot_leave_its_comment() -> None:
    how = WriteOptions(command="esdtool assign 'a\nb: c'")
    assert write_as("nemo", BOTH, how).splitlines()[1] == "param_group_overrides:"


def test_learning_rates_on_an_optimizer() -> None:
    """Twice is once, also after `load_state_dict`; a scheduler in the way is an error."""
    from esdtool.errors import AssignmentError
    from esdtool.optim import apply, param_groups

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, weight_decay=0.1)
    for _ in range(2):
        report = apply(optimizer, BOTH, model)
        optimizer.load_state_dict(optimizer.state_dict())
    assert report.matched == tuple(NAMES)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for name, ratio in zip(NAMES, RATIOS, strict=True):
        assert rates[id(model.get_parameter(name))] == pytest.approx((0.001 * ratio, ratio / 5))
    assert rates[id(model.get_parameter("lm_head.weight"))] == (0.001, 0.1)

    made = torch.optim.AdamW(param_groups(model, BOTH, lr=0.001), lr=0.001, weight_decay=0.1)
    for group in made.param_groups:
        assert all(rates[id(p)] == pytest.approx((group["lr"], group["weight_decay"])) for p in group["params"])
    with pytest.raises(AssignmentError, match=r"param_groups\(\.\.\., lr=1e-3\)"):
        param_groups(model, BOTH)

    scheduled = torch.optim.AdamW(nn.ParameterList([model.get_parameter(NAMES[5])]), lr=0.001)
    torch.optim.lr_scheduler.CosineAnnealingLR(scheduled, 10)
    with pytest.raises(AssignmentError, match="before the scheduler"):
        apply(scheduled, allocation(lr_ratio=RATIOS), model)


def test_tied_parameters_with_two_learning_rates() -> None:
    from esdtool.errors import AssignmentError
    from esdtool.optim import param_groups

    model = Model()
    model.model.layers.get_submodule("1").self_attn.q_proj.weight = model.model.layers.get_submodule(  # type: ignore
        "0"
    ).self_attn.q_proj.weight
    with pytest.raises(AssignmentError, match="one tied parameter has several learning-rate ratios"):
        param_groups(model, allocation(lr_ratio=RATIOS), lr=0.001)
    assert param_groups(model, allocation(lr_ratio=[2.0] * 6), lr=0.001)[0]["lr"] == 0.002
