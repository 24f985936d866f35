"""What decays can follow: the field's metrics, and the definitions of the public code of AlphaDecay."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

import esdtool
from esdtool.assignment.options import ScoreName
from esdtool.spectra.options import ScoreOptions

torch.manual_seed(0)
WEIGHTS = {f"layers.{index}.up_proj.weight": torch.randn(96, 64) * (index + 0.3) for index in range(4)}


def public_scores(weight: torch.Tensor, alpha: float) -> dict[str, float]:
    """The metrics of the public code, from its formulas: sum and maximum of the eigenvalues, softplus, entropy."""
    singular = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    eigenvalues = singular**2
    share = eigenvalues / eigenvalues.sum() + 6e-5
    return {
        "eigenvalue_sum": eigenvalues.sum(),
        "lambda_max": eigenvalues.max(),
        "alphahat-softplus": math.log(1 + math.exp(alpha * math.log10(eigenvalues.max()))),
        "entropy-smoothed": -(share * np.log(share)).sum() / math.log((singular > 6e-5).sum() + 6e-5),
    }


@pytest.mark.parametrize("score", ["eigenvalue_sum", "lambda_max", "alphahat-softplus", "entropy-smoothed"])
def test_scores_of_the_public_code_give_its_decays(score: Any) -> None:
    analysis = esdtool.analyze(WEIGHTS)
    expected = []
    for module in analysis.modules:
        assert module.alpha is not None
        expected.append(public_scores(WEIGHTS[module.parameter], module.alpha)[score])
    assignment = esdtool.assign(analysis, score=score, min_ratio=0.6666, max_ratio=5)
    found = [entry.score for entry in assignment.parameters.values()]
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    decays = np.interp(expected, [min(expected), max(expected)], [0.6666 * 0.1, 5 * 0.1])
    np.testing.assert_allclose(list(assignment.decays.values()), decays, rtol=1e-8)


@pytest.mark.parametrize("score", get_args(ScoreName))
def test_the_live_schedule_has_the_scores_of_an_analysis(score: Any) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(64, 96, bias=False)}) for _ in WEIGHTS)
    model.load_state_dict(WEIGHTS)
    live = esdtool.AlphaDecay(model, torch.optim.AdamW(model.parameters()), score=score)
    static = esdtool.assign(esdtool.analyze(WEIGHTS), score=score)
    assert live.last_decays == pytest.approx(static.decays, rel=1e-12)
    assert live.assignment().method == static.method


@pytest.mark.parametrize("score", ["gradient_over_weight_norm", "gradient_norm_over_lambda_max"])
@pytest.mark.parametrize("delay", [0, 1])
def test_gradients_over_weights(score: Any, delay: int) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(64, 96, bias=False)}) for _ in WEIGHTS)
    model.load_state_dict(WEIGHTS)
    live = esdtool.AlphaDecay(model, torch.optim.AdamW(model.parameters()), score=score, interval=2, delay=delay)
    assert set(live.last_decays.values()) == {0.1}
    expected = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        parameter.grad = torch.randn(96, 64) / (index + 1)
        weight, gradient = parameter.detach().double().numpy(), parameter.grad.double().numpy()
        divisor = {
            "gradient_over_weight_norm": np.linalg.norm(weight),
            "gradient_norm_over_lambda_max": np.linalg.norm(weight, ord=2) ** 2,
        }[score]
        expected[name] = np.linalg.norm(gradient) / divisor
    live.step()
    live.step()
    if delay:
        for parameter in model.parameters():
            parameter.grad = None  # the snapshot does not need them any more
        live.step()
    assert live.last_scores == pytest.approx(expected, rel=1e-9)


SIZE = 1600
"""Just large enough for an estimate."""


def test_an_estimated_alpha_is_read_on_a_live_model() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(SIZE, SIZE, bias=False)}) for _ in range(2))
    for layer, scale in zip(model.layers, (0.3, 0.9), strict=True):
        heavy = torch.randn(SIZE, SIZE, generator=generator) * torch.arange(1, SIZE + 1) ** -scale
        layer["q_proj"].weight.data = heavy  # type: ignore[index]
    options = ScoreOptions(spectrum="slq")
    live = esdtool.AlphaDecay(model, torch.optim.AdamW(model.parameters()), fit=options)
    analysis = esdtool.analyze(model, spectrum="slq")
    assert all(module.spectrum == "slq" for module in analysis.modules)
    assert live.last_alphas == pytest.approx({module.parameter: module.alpha for module in analysis.modules})
    assert live.last_notes == {}
    assert sorted(live.last_decays.values()) == pytest.approx([0.067, 0.5])
    flat = esdtool.AlphaDecay(model, torch.optim.AdamW(model.parameters()), fit=options, score="entropy")
    assert set(flat.last_notes.values()) == {"base decay: no entropy by this estimator"}
