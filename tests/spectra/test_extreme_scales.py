"""Weights whose squares are no float64, through every output of the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import save_file

SCALES = {0: 1.0, 1: 1e-200, 2: 1e-160, 3: 1e155, 4: 1e250}


def test_every_output_at_every_scale(esdtool_cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    weights = torch.randn(56, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.safetensors"
    save_file({f"layers.{layer}.mlp.up_proj.weight": weights * scale for layer, scale in SCALES.items()}, path)
    eigenvalues = np.sort(np.linalg.svd(weights.numpy(), compute_uv=False) ** 2)
    alpha = 1 + 28 / np.log(eigenvalues[28:] / eigenvalues[28]).sum()

    outputs = ["--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv", "--html", tmp_path / "a.html"]
    outputs += ["--esd", tmp_path / "a.safetensors", "--plots", tmp_path / "figures", "--sparklines"]
    for options in (["--no-cache", *outputs], [], ["--fit", "farms", "--farms-rows", "30", "--fit", "ks"]):
        done = esdtool_cli("analyze", path, *options)
        assert (done.returncode, done.stderr.count("Warning"), done.stderr.count("rank-deficient")) == (0, 0, 0), done
    modules = json.loads((tmp_path / "a.json").read_text())["modules"]
    assert [module["alpha"] for module in modules] == pytest.approx([alpha] * 5, rel=1e-9)
    assert [module["spectral_norm"] for module in modules] == pytest.approx(
        [math.sqrt(eigenvalues[-1]) * scale for scale in SCALES.values()], rel=1e-9
    )
    assert [module["lambda_max"] is None for module in modules] == [scale != 1 for scale in SCALES.values()]
    assert load_arrays(tmp_path / "a.safetensors").keys() == {"layers.0.mlp.up_proj"}
    for command in (["plot", path, "--out", tmp_path / "f"], ["assign", path], ["compare", path, tmp_path / "a.json"]):
        done = esdtool_cli(*command)
        assert (done.returncode, done.stderr.count("Warning")) == (0, 0), done
