"""The judge of the family tests: an analysis against the singular values of given matrices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import esdtool
from esdtool.analysis import Analysis
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
