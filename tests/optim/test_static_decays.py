"""param_groups and apply on real models and optimizers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from esdtool.analysis.run import analyze
from esdtool.assignment.assign import assign
from esdtool.assignment.document import Assignment, Default, DefaultRule, Entry
from esdtool.errors import AssignmentError
from esdtool.optim import apply, canonical_name, param_groups


@pytest.fixture
def model(tiny: ModuleType) -> nn.Module:
    return tiny.build()


@pytest.fixture
def assignment(model: nn.Module) -> Assignment:
    return assign(analyze(model))


def _by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, float | None]:
    """The decay of each parameter of a list of groups, checked to hold each once."""
    names = {parameter: canonical_name(name) for name, parameter in model.named_parameters()}
    found: dict[str, float | None] = {}
    for group in groups:
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = group.get("weight_decay")
    return found


def _trained(optimizer: torch.optim.Optimizer, tiny: ModuleType, model: nn.Module, steps: range = range(2)) -> None:
    for step in steps:
        tiny.loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


# --- param_groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unlisted", "matrix", "vector"), [("keep", None, None), ("no-decay", 0.0, 0.0), ("base", 0.1, 0.1)]
)
def test_groups(
    unlisted: Any, matrix: float | None, vector: float | None, model: nn.Module, assignment: Assignment
) -> None:
    groups = param_groups(model, assignment, unlisted=unlisted)
    decays = _by_name(model, groups)
    assert set(decays) == {name for name, _ in model.named_parameters()}
    for name, decay in decays.items():
        assert decay == assignment.decays.get(name, vector if "norm" in name else matrix)
    assert all(type(group.get("weight_decay", 0.0)) is float for group in groups)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.03)
    kept = _by_name(model, optimizer.param_groups)["lm_head.weight"]
    assert kept == (0.03 if matrix is None else matrix)


def test_the_default_of_the_file_is_followed(model: nn.Module, assignment: Assignment) -> None:
    ruled = Default(weight_decay=0.07, rules=(DefaultRule(match="ndim<2", weight_decay=0.0),))
    decays = _by_name(model, param_groups(model, assignment.model_copy(update={"default": ruled})))
    assert (decays["lm_head.weight"], decays["model.norm.weight"], decays["model.norm.bias"]) == (0.07, 0.0, 0.0)


def test_equal_values_are_merged(model: nn.Module) -> None:
    by_role = assign(analyze(model), granularity="role")
    assert len(param_groups(model, by_role)) == 8
    assert len(param_groups(model, by_role, merge=False)) == 15
    uniform = assign(analyze(model), assign="uniform", unlisted="base")
    assert len(param_groups(model, uniform)) == 1


def test_another_base(model: nn.Module, assignment: Assignment) -> None:
    decays = _by_name(model, param_groups(model, assignment, base=0.02, unlisted="base"))
    name = next(iter(assignment.decays))
    assert decays[name] == pytest.approx(assignment.decays[name] / 5)
    assert decays["lm_head.weight"] == 0.02


def test_frozen_parameters_are_left_out(model: nn.Module, assignment: Assignment, tiny: ModuleType) -> None:
    model.lm_head.requires_grad_(False)
    frozen = model.get_parameter(tiny.assigned()[0]).requires_grad_(False)
    decays = _by_name(model, param_groups(model, assignment))
    assert not {"lm_head.weight", tiny.assigned()[0]} & set(decays)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter is not frozen])
    assert apply(optimizer, assignment, model).not_optimized == (tiny.assigned()[0],)


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "data parallel": lambda model: nn.ModuleDict({"module": model}),
    "both": lambda model: torch.compile(nn.ModuleDict({"module": model}), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_do_not_change_names(
    wrap: Callable[[nn.Module], nn.Module], model: nn.Module, assignment: Assignment
) -> None:
    wrapped = wrap(model)
    assert param_groups(wrapped, assignment) == param_groups(model, assignment)


def test_a_path_will_do(model: nn.Module, assignment: Assignment, tmp_path: Path) -> None:
    assignment.save(tmp_path / "wd.json")
    assert param_groups(model, str(tmp_path / "wd.json")) == param_groups(model, assignment)


def test_a_transformers_llama(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    llama = transformers.LlamaForCausalLM(config)
    llama.save_pretrained(tmp_path)
    assignment = assign(analyze(tmp_path))
    decays = _by_name(llama, param_groups(llama, assignment, unlisted="no-decay"))
    assert len(assignment.decays) == 14
    assert {name: decay for name, decay in decays.items() if decay} == assignment.decays


def _with(assignment: Assignment, **entries: Entry) -> Assignment:
    return assignment.model_copy(update={"parameters": {**assignment.parameters, **entries}})


TIED = {"lm_head.weight": Entry(weight_decay=0.1), "model.embed_tokens.weight": Entry(weight_decay=0.2)}


def test_tied_weights(tiny: ModuleType, assignment: Assignment) -> None:
    tied = tiny.build(tied=True)
    for name in TIED:
        one = _with(assignment, **{name: Entry(weight_decay=0.3)})
        assert _by_name(tied, param_groups(tied, one))["model.embed_tokens.weight"] == 0.3
    same = _with(assignment, **dict.fromkeys(TIED, Entry(weight_decay=0.3)))
    assert _by_name(tied, param_groups(tied, same))["model.embed_tokens.weight"] == 0.3
    with pytest.raises(
        AssignmentError, match=r"one tied parameter has several decays \(lm_head.weight: 0.1, model.emb"
    ):
        param_groups(tied, _with(assignment, **TIED))
    with pytest.warns(UserWarning, match="one tied parameter has several decays"):
        assert (
            _by_name(tied, param_groups(tied, _with(assignment, **TIED), strict=False))["model.embed_tokens.weight"]
            is None
        )
    report = apply(torch.optim.AdamW(tied.parameters()), _with(assignment, **TIED), tied, strict=False)
    assert len(report.conflicts) == 1


def test_unknown_and_misshapen_entries(model: nn.Module, assignment: Assignment) -> None:
    unknown = _with(assignment, **{"model.layers.9.mlp.up_proj.weight": Entry(weight_decay=0.1)})
    with pytest.raises(AssignmentError, match=r"layers.9.mlp.up_proj.weight is not a parameter.*nearest name is model"):
        param_groups(model, unknown)
    with pytest.warns(UserWarning, match=r"layers.9.mlp.up_proj.weight is not in the model"):
        groups = param_groups(model, unknown, strict=False)
    assert groups == param_groups(model, assignment)
    report = apply(torch.optim.AdamW(model.parameters()), unknown, model, strict=False)
    assert report.unmatched == ("model.layers.9.mlp.up_proj.weight",)
    assert report.matched == tuple(assignment.parameters)

    name = next(iter(assignment.parameters))
    entry = assignment.parameters[name].model_copy(update={"shape": (64, 65)})
    for strict in (True, False):
        with pytest.raises(AssignmentError, match=r"q_proj.weight: shape \[64, 65\] in the assignment, \[64, 64\]"):
            param_groups(model, _with(assignment, **{name: entry}), strict=strict)


@pytest.mark.filterwarnings("ignore:weight-decay assignment")
def test_the_wrong_model(assignment: Assignment) -> None:
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(AssignmentError, match="is not a parameter of the model"):
        param_groups(other, assignment)
    with pytest.raises(AssignmentError, match="no parameter of the model is in the assignment"):
        param_groups(other, assignment, strict=False)
    with pytest.raises(AssignmentError, match="has no parameters"):
        param_groups(nn.ReLU(), assignment)
    with pytest.raises(AssignmentError, match="unknown choice"):
        param_groups(
            other, Assignment(base_weight_decay=0.1, parameters={"0.weight": Entry(weight_decay=0.1)}), unlisted="x"
        )  # type: ignore[arg-type]


# --- apply ------------------------------------------------------------------------------------------------------

IMPLEMENTATIONS: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}, {"fused": True}]


@pytest.mark.parametrize("options", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_apply_equals_param_groups(
    kind: Any, options: dict[str, Any], tiny: ModuleType, assignment: Assignment
) -> None:
    built, changed = tiny.build(), tiny.build()
    first = kind(param_groups(built, assignment), lr=1e-2, weight_decay=0.1, **options)
    second = kind(changed.parameters(), lr=1e-2, weight_decay=0.1, **options)
    report = apply(second, assignment, changed)
    assert report.num_groups == len(second.param_groups) == 15
    for optimizer, model in ((first, built), (second, changed)):
        _trained(optimizer, tiny, model, range(3))
    for one, other in zip(built.parameters(), changed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", IMPLEMENTATIONS)
def test_decay_acts_on_each_module(options: dict[str, Any], model: nn.Module, assignment: Assignment) -> None:
    """With zero gradients AdamW only decays: w <- w (1 - lr wd)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.1, **options)
    apply(optimizer, assignment, model, unlisted="no-decay")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.5 * assignment.decays.get(name, 0.0))
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=0)


def test_the_state_survives(tiny: ModuleType, model: nn.Module, assignment: Assignment) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.8, 0.99))
    _trained(optimizer, tiny, model)
    state = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    saved = copy.deepcopy(state)
    group = optimizer.param_groups[0]
    apply(optimizer, assignment, model)
    assert optimizer.param_groups[0] is group
    assert all(part["betas"] == (0.8, 0.99) and part["lr"] == 1e-2 for part in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        assert optimizer.state[parameter] is state[name]
        assert all(torch.equal(optimizer.state[parameter][key], saved[name][key]) for key in saved[name])
    _trained(optimizer, tiny, model, range(2, 4))


def test_applying_again_is_how_to_resume(tiny: ModuleType, model: nn.Module, assignment: Assignment) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    apply(optimizer, assignment, model)
    saved = copy.deepcopy(optimizer.state_dict())
    doubled = assignment.with_base(0.2)
    again = torch.optim.AdamW(model.parameters())
    apply(again, doubled, model)
    again.load_state_dict(saved)  # brings the old decays back
    assert _by_name(model, again.param_groups) == _by_name(model, optimizer.param_groups)
    report = apply(again, doubled, model)
    assert report.num_groups == len(saved["param_groups"])
    assert {name: _by_name(model, again.param_groups)[name] for name in doubled.decays} == doubled.decays


def test_options_and_names_of_groups_are_kept(model: nn.Module, assignment: Assignment) -> None:
    named = list(model.named_parameters())
    late = {"params": named[len(named) // 2 :], "lr": torch.tensor(0.5), "initial_lr": 0.7}
    optimizer = torch.optim.AdamW([{"params": named[: len(named) // 2]}, late], lr=torch.tensor(0.1), foreach=False)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    apply(optimizer, assignment, model)
    parameters = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert [parameters[name] for name in group["param_names"]] == group["params"]
        first_half = names.index(group["param_names"][0]) < len(named) // 2
        assert float(group["lr"]) == pytest.approx(0.1 if first_half else 0.5)
        assert group.get("initial_lr") == (None if first_half else 0.7)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert len({id(rate) for rate in rates}) == len(rates)  # schedulers fill tensors in place
    # The parts of a group stand where it stood.
    order = [names.index(group["param_names"][0]) < len(named) // 2 for group in optimizer.param_groups]
    assert order == sorted(order, reverse=True)


def test_muon_beside_adamw(tiny: ModuleType, model: nn.Module, assignment: Assignment) -> None:
    matrices = [parameter for name, parameter in model.named_parameters() if ".layers." in name and parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1)
    adamw = torch.optim.AdamW(others, lr=1e-2, weight_decay=0.02)
    report = apply([muon, adamw], assignment, model)
    assert report.not_optimized == ()
    assert _by_name(model, muon.param_groups) == assignment.decays
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.02]
    for step in range(2):
        tiny.loss(model, step).backward()
        muon.step()
        adamw.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_what_optimizers_cannot_do(model: nn.Module, assignment: Assignment, tiny: ModuleType) -> None:
    one_group = r"q_proj.weight need different decays but share a group of AdamW"
    with pytest.raises(AssignmentError, match=f"{one_group}, which must not be split"):
        apply(torch.optim.AdamW(model.parameters()), assignment, model, split=False)
    apply(torch.optim.AdamW(param_groups(model, assignment)), assignment, model, split=False)

    scheduled = torch.optim.AdamW(model.parameters())
    torch.optim.lr_scheduler.ConstantLR(scheduled)
    with pytest.raises(AssignmentError, match=f"{one_group}, to which a learning-rate scheduler is attached"):
        apply(scheduled, assignment, model)
    ready = torch.optim.AdamW(param_groups(model, assignment))
    scheduler = torch.optim.lr_scheduler.ConstantLR(ready)
    apply(ready, assignment.with_base(0.2), model)
    ready.step()
    scheduler.step()

    with pytest.raises(AssignmentError, match="Rprop has no weight_decay in its groups"):
        apply(torch.optim.Rprop(model.parameters()), assignment, model)
    with pytest.raises(AssignmentError, match="holds none of the model's parameters"):
        apply(torch.optim.AdamW(tiny.build().parameters()), assignment, model)
    twice = torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.lm_head.parameters())
    with pytest.raises(AssignmentError, match=r"shape \[80, 64\] is in two groups or optimizers"):
        apply(twice, assignment, model)
    with pytest.raises(AssignmentError, match="no optimizer was given"):
        apply([], assignment, model)
    with pytest.raises(AssignmentError, match="Linear is no optimizer"):
        apply(nn.Linear(2, 2), assignment, model)  # type: ignore[arg-type]


def test_a_model_of_a_billion_parameters(tiny: ModuleType) -> None:
    """LLaMA 1B of the paper on the meta device: 168 modules, no data."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5461,
        num_hidden_layers=24,
        num_attention_heads=32,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    matrices = [(name, p) for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    assert len(matrices) == 168
    by_role = {name: 0.01 * (1 + index % 7) for index, (name, _) in enumerate(matrices)}
    assignment = Assignment(
        base_weight_decay=0.1,
        parameters={name: Entry(weight_decay=by_role[name], shape=tuple(p.shape)) for name, p in matrices},
    )
    assert len(param_groups(model, assignment)) == 8
    optimizer = torch.optim.AdamW(model.parameters())
    assert apply(optimizer, assignment, model).num_groups == 8
    assert math.isclose(sum(len(group["params"]) for group in optimizer.param_groups), len(list(model.parameters())))


def test_sharded_optimizers_are_refused(model: nn.Module, assignment: Assignment) -> None:
    class ZeroRedundancyOptimizer(torch.optim.AdamW):
        """Stands for torch's own, which needs a process group."""

    with pytest.raises(AssignmentError, match="partitions its groups once"):
        apply(ZeroRedundancyOptimizer(model.parameters()), assignment, model)
    flat = nn.Module()
    flat._flat_param = nn.Parameter(torch.zeros(4))
    with pytest.raises(AssignmentError, match="FSDP1"):
        param_groups(flat, assignment)
