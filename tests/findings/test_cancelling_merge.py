"""Task vectors that cancel, against numpy; and what `merged_from` refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import esdtool
from esdtool.analysis.task_vectors import task_vectors
from esdtool.checkpoint import from_state_dict
from esdtool.cli import app
from esdtool.errors import UsageError
from esdtool.modules import select_modules
from tests.findings.models import Tensors, healthy

NAME = "model.layers.0.self_attn.q_proj"


def parents(base: Tensors) -> list[Tensors]:
    """Two fine-tunes that move one module against each other, and all others without regard to each other."""
    generator = torch.Generator().manual_seed(3)
    first = {name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    second = {name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    key = f"{NAME}.weight"
    noise = 0.002 * torch.randn(base[key].shape, generator=generator)
    second[key] = base[key] - (first[key] - base[key]) + noise
    return [first, second]


def test_changes_that_cancel_are_found() -> None:
    base = healthy(layers=2)
    first, second = parents(base)
    merged = {name: (first[name] + second[name]) / 2 for name in base}
    found = esdtool.analyze(merged, base=base, merged_from=[first, second], jobs=1).findings
    assert found is not None
    (finding,) = [finding for finding in found if finding.rule == "cancelling-merge"]
    assert finding.modules == (NAME,)
    one, other = ((parent[f"{NAME}.weight"] - base[f"{NAME}.weight"]).double().numpy() for parent in (first, second))
    expected = np.linalg.norm(one + other) / np.hypot(np.linalg.norm(one), np.linalg.norm(other))
    assert finding.evidence[0].value == pytest.approx(expected, rel=1e-5)


def test_independent_changes_are_orthogonal_but_for_chance() -> None:
    base = healthy(layers=2)
    checkpoints = [from_state_dict(tensors) for tensors in (base, *parents(base))]
    modules = select_modules(checkpoints[0].tensors.values()).modules
    deviations = []
    for module in modules:
        found = task_vectors([(parent, module) for parent in checkpoints[1:]], checkpoints[0], module)
        assert found is not None
        assert found.retained is not None
        if module.name != NAME:
            deviations.append((found.retained - 1) / found.chance)
    assert 0.3 < np.std(deviations) < 1.7
    assert task_vectors([], checkpoints[0], modules[0]) is None


def test_parents_need_a_base() -> None:
    base = healthy(layers=1)
    for options in ({"merged_from": [base, base]}, {"merged_from": [base], "base": base}):
        with pytest.raises(UsageError, match="merged_from"):
            esdtool.analyze(base, **options)  # type: ignore[arg-type]
    result = CliRunner().invoke(app, ["analyze", "a", "--merged-from", "b"])
    assert isinstance(result.exception, UsageError)
