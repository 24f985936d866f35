"""Weights that are computed from parts, against the weight that the torch module itself applies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import esdtool
from esdtool.assignment.assign import assign
from esdtool.assignment.check import check
from esdtool.checkpoint import from_model, from_state_dict
from esdtool.optim import param_groups

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


def _pruned(module: nn.Module) -> nn.Module:
    prune.random_unstructured(module, "weight", amount=0.4)
    return module


def _trained(module: nn.Module, name: str = "weight") -> nn.Module:
    """The module after its parameters moved and it was applied once more."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module.eval()


LINEAR = (24, 40)
CASES: dict[str, Callable[[], nn.Module]] = {
    "weight-norm-old": lambda: nn.utils.weight_norm(nn.Linear(*LINEAR)),
    "weight-norm-old-whole": lambda: nn.utils.weight_norm(nn.Linear(*LINEAR), dim=None),
    "weight-norm-old-inputs": lambda: nn.utils.weight_norm(nn.ConvTranspose1d(*LINEAR, 3), dim=1),
    "weight-norm-old-kernel": lambda: nn.utils.weight_norm(nn.Conv1d(*LINEAR, 5), dim=2),
    "weight-norm-new": lambda: parametrizations.weight_norm(nn.Conv2d(*LINEAR, 3)),
    "weight-norm-new-kernel": lambda: parametrizations.weight_norm(nn.Conv1d(*LINEAR, 5), dim=2),
    "spectral-norm-old": lambda: nn.utils.spectral_norm(nn.Linear(*LINEAR)),
    "spectral-norm-new": lambda: parametrizations.spectral_norm(nn.Conv2d(*LINEAR, 3)),
    "spectral-norm-transposed": lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(*LINEAR, 3)),
    "pruned": lambda: _pruned(nn.Linear(*LINEAR)),
}


def _model(case: str) -> tuple[nn.Module, torch.Tensor]:
    """(a model with one such module, the weight that it applies in inference)."""
    torch.manual_seed(0)
    module = _trained(CASES[case]())
    if case == "pruned" or "old" in case:  # hooks set the weight when the module is called
        with torch.no_grad():
            inputs = torch.randn(2, 24) if isinstance(module, nn.Linear) else torch.randn(2, 24, 9)
            module(inputs)
    return nn.ModuleDict({"proj": module}), module.weight.detach().clone()


@pytest.mark.parametrize("case", CASES)
def test_the_weight_is_the_one_that_the_module_applies(case: str) -> None:
    model, weight = _model(case)
    for checkpoint in (from_state_dict(model.state_dict()), from_model(model)):
        assert checkpoint.tensors["proj.weight"].shape == tuple(weight.shape)
        torch.testing.assert_close(checkpoint.read("proj.weight"), weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(checkpoint.read_rows("proj.weight", 3, 9), weight[3:9], rtol=1e-5, atol=1e-6)
        assert [name for name in checkpoint.tensors if "weight" in name] == ["proj.weight"]


@pytest.mark.parametrize("case", CASES)
def test_an_assignment_names_the_parameters_of_the_live_model(case: str) -> None:
    model, weight = _model(case)
    analysis = esdtool.analyze(model.state_dict(), min_eigs=4)
    (module,) = analysis.modules
    kernel = weight.double().reshape(*weight.shape[:2], -1).permute(2, 0, 1).numpy()
    scale = 1.0 if weight.ndim == 2 else 0.5
    expected = np.sort((np.linalg.svd(kernel, compute_uv=False) ** 2).ravel()) * scale
    np.testing.assert_allclose(analysis.esds[module.name], expected, rtol=1e-5, atol=1e-6 * expected[-1])
    assignment = assign(analysis, weight_decay=0.1)
    names = {name for name, _ in model.named_parameters() if "bias" not in name}
    assert assignment.parameters.keys() == names
    groups = [group for group in param_groups(model, assignment) if "weight_decay" in group]
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if name in names:
            assert decays[id(parameter)] == assignment.parameters[name].weight_decay
    report = check(assignment, from_state_dict(model.state_dict()).tensors.values())
    assert not report.unknown
    assert not report.wrong_shape
    assert not report.uncovered


def test_a_file_of_one_generation_fits_a_model_of_the_other() -> None:
    old, new = nn.utils.weight_norm(nn.Linear(*LINEAR)), parametrizations.weight_norm(nn.Linear(*LINEAR))
    assignment = assign(
        esdtool.analyze({f"proj.{k}": v for k, v in old.state_dict().items()}, min_eigs=4), weight_decay=0.1
    )
    model = nn.ModuleDict({"proj": new})
    for wanted in (
        assignment,
        assign(esdtool.analyze({"proj.weight": new.weight.detach()}, min_eigs=4), weight_decay=0.1),
    ):
        groups = param_groups(model, wanted)
        decayed = [p for group in groups if group.get("weight_decay") for p in group["params"]]
        assert len(decayed) == 2
        parametrization = new.parametrizations.weight
        assert {id(p) for p in decayed} == {id(parametrization.original0), id(parametrization.original1)}


def test_several_parametrizations_and_unknown_ones_are_left_alone() -> None:
    orthogonal = parametrizations.orthogonal(nn.Linear(24, 24))
    twice = parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(*LINEAR)))

    class Symmetric(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight.triu() + weight.triu(1).T

    custom = nn.Linear(24, 24)
    parametrize.register_parametrization(custom, "weight", Symmetric())
    plain = {"q.weight": torch.randn(64, 64)}
    for module in (orthogonal, twice, custom):
        state = plain | {f"proj.{name}": tensor for name, tensor in module.state_dict().items()}
        analysis = esdtool.analyze(state, min_eigs=4)
        assert [found.parameter for found in analysis.modules] == ["q.weight"]
        assert any("part of a parametrised weight" in tensor.reason for tensor in analysis.skipped)


def test_a_weight_that_is_stored_beside_its_parts_is_taken_as_it_is() -> None:
    weight = torch.randn(64, 64)
    checkpoint = from_state_dict(
        {"p.weight": weight, "p.weight_g": torch.ones(64, 1), "p.weight_v": torch.randn(64, 64)}
    )
    torch.testing.assert_close(checkpoint.read("p.weight"), weight)


@pytest.mark.parametrize("length", [torch.ones(3, 1), torch.ones(64, 64), torch.ones(2, 2, 2)])
def test_parts_that_do_not_fit_stay_parts(length: torch.Tensor) -> None:
    checkpoint = from_state_dict({"p.weight_g": length, "p.weight_v": torch.randn(64, 64)})
    assert set(checkpoint.tensors) == {"p.weight_g", "p.weight_v"}
