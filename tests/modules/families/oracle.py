"""The judge of the family tests: an analysis against the singular values of given matrices."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import esdtool
from esdtool.analysis.document import Analysis
from esdtool.checkpoint import from_state_dict, open_checkpoint


def check(
    source: Path | str | Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Analysis:
    """Assert that exactly the expected modules are found, each with the spectrum of its matrix.

    Args:
        source: a checkpoint, or a state dict.
        expected: module name to the matrix [rows, columns] that the model itself uses.
        config: the configuration that goes with a state dict.
        options: of `esdtool.analyze`.
    """
    checkpoint = from_state_dict(source, config=config) if isinstance(source, Mapping) else open_checkpoint(source)
    analysis = esdtool.analyze(checkpoint, **{"min_eigs": 2, "jobs": 1} | options)
    found = {module.name for module in analysis.modules}
    assert found == set(expected), {"missing": sorted(set(expected) - found), "extra": sorted(found - set(expected))}
    assert len(analysis.modules) == len(expected)
    for name, matrix in expected.items():
        singular = np.linalg.svd(matrix.detach().to(torch.float64).numpy(), compute_uv=False)
        computed = np.sqrt(analysis.esds[name])
        np.testing.assert_allclose(computed, singular[::-1], rtol=0, atol=1e-6 * singular[0], err_msg=name)
    scored = {module.parameter for module in analysis.modules}
    skipped = {tensor.name: tensor.reason for tensor in analysis.skipped}
    assert scored | set(skipped) >= set(checkpoint.tensors)
    assert not scored & set(skipped)
    assert all(skipped.values())
    assert not [reason for reason in skipped.values() if reason.startswith(("fused", "stacked"))]
    return analysis


def check_layouts(
    model: Any, folder: Path, expected: Mapping[str, torch.Tensor], *, in_files: Mapping[str, str] | None = None
) -> tuple[Analysis, Analysis]:
    """Check a model against the files that it writes, against its state dict in a file, and against itself in memory.

    Args:
        model: the live model.
        folder: an empty folder.
        expected: module name and matrix as the live model names them.
        in_files: patterns and replacements that turn a live name into the one in the files.

    Returns:
        The analyses of the files and of the state dict.
    """
    model.save_pretrained(folder / "saved")
    renamed = {}
    for name, matrix in expected.items():
        for pattern, replacement in (in_files or {}).items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = matrix
    saved = check(folder / "saved", renamed)

    model.config.save_pretrained(folder / "live")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "live" / "model.safetensors")
    live = check(folder / "live", expected)

    memory = esdtool.analyze(model, min_eigs=2, jobs=1)
    assert [(module.name, module.role, module.expert) for module in memory.modules] == [
        (module.name, module.role, module.expert) for module in live.modules
    ]
    for name, eigenvalues in memory.esds.items():
        np.testing.assert_array_equal(eigenvalues, live.esds[name])
    return saved, live


def random_model(
    model_class: type[Any], config: Any, *, zeroed: Callable[[str], bool] = lambda name: name.endswith("bias")
) -> Any:
    """A model in evaluation all of whose matrices are random; by themselves, some of them start with zeros.

    Args:
        model_class: of transformers.
        config: its configuration.
        zeroed: by name, which of the other parameters are set to 0; by default biases, which probes must not see.
    """
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_()
            elif zeroed(name):
                parameter.zero_()
    return model


def assert_whole(fused: torch.Tensor, *parts: torch.Tensor) -> None:
    """The parts make up the fused matrix: nothing is lost, nothing counts twice."""
    assert sum(part.numel() for part in parts) == fused.numel()
    assert sum(part.square().sum() for part in parts).item() == pytest.approx(fused.square().sum().item(), rel=1e-5)


def roles(analysis: Analysis) -> dict[str, str]:
    """Role by module name."""
    return {module.name: module.role for module in analysis.modules}


def linears(model: nn.Module, *left_out: str) -> dict[str, torch.Tensor]:
    """Matrix [out, in] of every linear layer, but of those whose name ends as in `left_out`."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not name.endswith(left_out):
            weight = module.weight.detach()
            found[name] = weight if isinstance(module, nn.Linear) else weight.T
    return found
