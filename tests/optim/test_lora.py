"""Models with PEFT's adapters: what decays and schedules make of them."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import esdtool
from esdtool.assignment.document import Assignment
from esdtool.errors import AssignmentError, NothingToAnalyzeError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def with_lora(model: nn.Module, **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))


@pytest.fixture
def assignment(tiny: ModuleType) -> Assignment:
    return esdtool.assign(esdtool.analyze(tiny.build(layers=1)))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", [esdtool.AlphaDecay, esdtool.LayerwiseLR])
def test_schedules_refuse_adapters_by_name_and_say_what_to_do(tiny: ModuleType, kind: Any) -> None:
    model = with_lora(tiny.build(layers=1))
    optimizer = torch.optim.AdamW(trained(model), weight_decay=0.1)
    options = {"fraction": 1} if kind is esdtool.LayerwiseLR else {}
    with pytest.raises(
        NothingToAnalyzeError,
        match=r"base of this model is frozen.*2 updates.*self_attn\.q_proj\.weight, of rank 4.*"
        rf"{kind.name} does not act.*SpectralMonitor",
    ):
        kind(model, optimizer, **options)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


def test_an_assignment_of_the_base_is_found_under_the_names_of_peft(
    tiny: ModuleType, assignment: Assignment, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_lora(tiny.build(layers=1))
    optimizer = torch.optim.AdamW(trained(model), weight_decay=0.1)
    with caplog.at_level(logging.WARNING):
        report = esdtool.apply(optimizer, assignment, model)
    assert set(report.matched) == set(assignment.parameters) == set(report.not_optimized)
    assert "all 7 parameters of the assignment are frozen" in caplog.text
    groups = esdtool.param_groups(model, assignment)
    assert {id(each) for group in groups for each in group["params"]} == set(map(id, trained(model)))


def test_base_weights_that_are_trained_beside_adapters_get_their_decays(
    tiny: ModuleType, assignment: Assignment, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_lora(tiny.build(layers=1), modules_to_save=["up_proj"])
    layer = model.base_model.model.model.layers[0]
    layer.self_attn.q_proj.base_layer.weight.requires_grad_(True)
    with caplog.at_level(logging.WARNING):
        groups = esdtool.param_groups(model, assignment, unlisted="no-decay")
    assert caplog.text == ""
    decays = {id(each): group["weight_decay"] for group in groups for each in group["params"]}
    names = {
        "model.layers.0.self_attn.q_proj.weight": layer.self_attn.q_proj.base_layer.weight,
        "model.layers.0.mlp.up_proj.weight": layer.mlp.up_proj.modules_to_save.default.weight,
    }
    for name, parameter in names.items():
        assert decays.pop(id(parameter)) == pytest.approx(assignment.parameters[name].weight_decay)
    assert set(decays.values()) == {0.0}


def test_exchanged_arguments_are_named(tiny: ModuleType, assignment: Assignment) -> None:
    model: Any = tiny.build(layers=1)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    with pytest.raises(AssignmentError, match=r"exchanged: it is apply\(optimizer, assignment, model\)"):
        esdtool.apply(model, assignment, optimizer)
    with pytest.raises(AssignmentError, match=r"it is param_groups\(model, assignment\)"):
        esdtool.param_groups(assignment, model)  # type: ignore[arg-type]


def test_a_part_of_the_model_is_told_from_the_whole(tiny: ModuleType, assignment: Assignment) -> None:
    model = tiny.build(layers=1)
    with pytest.raises(AssignmentError, match=r"pass the whole model and not its part \.model"):
        esdtool.param_groups(model.model, assignment)
    inner = esdtool.assign(esdtool.analyze(model.model))
    with pytest.raises(AssignmentError, match=r"pass model\.model"):
        esdtool.param_groups(model, inner)
