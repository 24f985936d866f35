"""Singular vectors against numpy's SVD, on random and on planted matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import esdtool
from esdtool.analysis.document import Analysis
from esdtool.cli import app
from esdtool.errors import UsageError
from esdtool.report.html import analysis_page
from esdtool.report.markdown import analysis_markdown
from esdtool.spectra import vectors as module_of_vectors
from esdtool.spectra.spectrum import compute_spectrum
from esdtool.spectra.vector_records import VectorGroup, Vectors, VectorSide
from esdtool.spectra.vectors import find_vectors, ipr_ceiling, ipr_random
from tests.conftest import llama_tensors

SHAPES = [(200, 200), (120, 300), (300, 120), (60, 1300)]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def found(*matrices: np.ndarray, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Vectors:
    """The vectors of matrices, with the larger half of the eigenvalues for a tail."""
    tensors = [torch.from_numpy(matrix).to(dtype) for matrix in matrices]
    spectrum = compute_spectrum(tensors, "gram-float64", scale=scale)
    xmin = float(spectrum.eigenvalues[spectrum.eigenvalues.size // 2])
    return find_vectors(tensors, spectrum, xmin=xmin, scale=scale)


def by_numpy(matrix: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Left and right vectors [n, dimension], and the singular values, the largest first."""
    left, singular, right = np.linalg.svd(matrix, full_matrices=False)
    return [left.T, right], singular


@pytest.mark.parametrize("shape", SHAPES)
def test_ratios_are_numpys(shape: tuple[int, int]) -> None:
    matrix = noise(*shape)
    result, (sides, singular) = found(matrix), by_numpy(matrix)
    half = singular.size - singular.size // 2
    assert (result.num_vectors, result.num_undetermined) == (singular.size, 0)
    for vectors, (_, side) in zip(sides, result.sides(), strict=True):
        ratios = (vectors**4).sum(axis=1)
        for group, part in ((side.tail, ratios[:half]), (side.bulk, ratios[half:])):
            assert group.count == part.size
            assert (group.ipr, group.ipr_max) == pytest.approx((part.mean(), part.max()), rel=1e-6)
            excess = (part - 3 / (vectors.shape[1] + 2)) / (1 - 3 / (vectors.shape[1] + 2))
            assert group.localisation == pytest.approx(excess.clip(0, 1).mean(), rel=1e-4)


@pytest.mark.parametrize("dimension", [2, 3, 10, 200])
def test_random_vectors_have_the_ratio_of_porter_and_thomas(dimension: int) -> None:
    vectors = noise(5_000, dimension)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ratios = (vectors**4).sum(axis=1)
    assert ipr_random(dimension) == pytest.approx(ratios.mean(), abs=5 * ratios.std() / 70)
    assert (ratios > ipr_ceiling(dimension, ratios.size)).sum() == 0


@pytest.mark.parametrize("shape", [(40, 40), (40, 90)])
def test_no_vector_of_random_matrices_counts_as_localised(shape: tuple[int, int]) -> None:
    results = [found(noise(*shape, seed=seed)) for seed in range(60)]
    assert sum(side.num_localised for result in results for _, side in result.sides()) == 0
    for name in ("rows", "columns"):
        side: list[VectorSide] = [getattr(result, name) for result in results]
        assert np.mean([each.tail.ipr for each in side]) == pytest.approx(side[0].ipr_random, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "count"), [((4, 9), 2000), ((16, 16), 2000), ((64, 64), 1000), ((64, 256), 1000)])
def test_fewer_than_one_random_matrix_in_a_thousand_has_a_localised_vector(shape: tuple[int, int], count: int) -> None:
    results = (found(noise(*shape, seed=seed)) for seed in range(count))
    hits = sum(any(side.num_localised for _, side in result.sides()) for result in results)
    assert hits <= count / 1000


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_huge_channel_is_named(shape: tuple[int, int], axis: int) -> None:
    matrix = noise(*shape)
    np.moveaxis(matrix, axis, 0)[17] *= 40
    result, (sides, singular) = found(matrix), by_numpy(matrix)
    ours, other = (result.rows, result.columns) if axis == 0 else (result.columns, result.rows)
    first = ours.most_localised[0]
    assert (first.rank, first.in_tail) == (1, True)
    assert first.eigenvalue == pytest.approx(singular[0] ** 2)
    assert first.ipr == pytest.approx((sides[axis][0] ** 4).sum())
    assert [channel.index for channel in first.channels] == [17]
    assert first.channels[0].share == pytest.approx(sides[axis][0][17] ** 2)
    assert first.localisation > 0.95
    assert other.num_localised == 0
    assert other.most_localised == ()


def test_the_channels_go_on_until_half_of_the_vector() -> None:
    matrix = noise(100, 150)
    pattern = np.zeros(150)
    pattern[[3, 50, 77]] = [0.6, 0.6, np.sqrt(1 - 0.72)]
    matrix += 1000 * np.outer(np.ones(100) / 10, pattern)
    first = found(matrix).columns.most_localised[0]
    assert {channel.index for channel in first.channels} == {3, 50}
    assert [channel.share for channel in first.channels] == pytest.approx([0.36, 0.36], abs=0.01)


def test_signs_and_permutations_change_nothing() -> None:
    matrix = noise(80, 130)
    matrix[:, 5] *= 20
    order = np.random.default_rng(1).permutation(130)
    signs = np.where(noise(130) > 0, 1.0, -1.0)
    one, other = found(matrix), found(matrix[:, order] * signs)
    assert other.rows.bulk.ipr == pytest.approx(one.rows.bulk.ipr)
    assert other.columns.tail.ipr == pytest.approx(one.columns.tail.ipr)
    assert order[other.columns.most_localised[0].channels[0].index] == 5


def test_vectors_of_equal_singular_values_are_left_out() -> None:
    # Of the identity any basis is one of singular vectors, the localised unit vectors among them.
    constant = found(np.eye(60))
    assert (constant.num_vectors, constant.num_undetermined) == (0, 60)
    assert (constant.rows.bulk, constant.rows.tail, constant.rows.most_localised) == (None, None, ())
    left, _ = np.linalg.qr(noise(60, 60))
    right, _ = np.linalg.qr(noise(90, 60, seed=1))
    twins = np.arange(60.0, 0, -1)
    twins[10] = twins[11]
    result = found(left * twins @ right.T)
    assert (result.num_vectors, result.num_undetermined) == (58, 2)
    expected = np.delete((left**4).sum(axis=0), [10, 11])
    groups = (result.rows.bulk, result.rows.tail)
    assert sum(group.ipr * group.count for group in groups) == pytest.approx(expected.sum())


def test_low_rank() -> None:
    result = found(noise(70, 5) @ noise(5, 90, seed=1))
    assert (result.num_vectors, result.num_undetermined) == (5, 65)
    assert (result.rows.bulk, result.rows.tail.count) == (None, 5)
    one = found(np.outer(noise(70), np.eye(90)[8]))
    assert (one.num_vectors, one.num_undetermined) == (1, 69)
    assert one.columns.most_localised[0].channels[0].index == 8
    # Float32 rounding makes 65 singular values more, whose vectors are those of noise.
    assert found(noise(70, 5) @ noise(5, 90, seed=1), dtype=torch.float32).num_vectors == 5


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1)])
def test_a_vector_is_its_own(shape: tuple[int, int]) -> None:
    matrix = noise(*shape)
    result = found(matrix)
    long = max((result.rows, result.columns), key=lambda side: side.dimension)
    assert long.tail.ipr == pytest.approx((matrix**4).sum() / (matrix**2).sum() ** 2)
    assert result.num_undetermined == 0


@pytest.mark.parametrize("exponent", [-500, 500])
def test_weights_of_any_scale(exponent: int) -> None:
    matrix = noise(60, 80)
    matrix[:, 4] *= 30
    usual, scaled = found(matrix), found(matrix * 2.0**exponent)
    assert scaled.columns.tail == usual.columns.tail
    vector, expected = scaled.columns.most_localised[0], usual.columns.most_localised[0].eigenvalue
    assert vector.eigenvalue == pytest.approx(np.ldexp(expected, 2 * exponent))


def test_matrices_are_pooled() -> None:
    matrices = [noise(30, 50, seed=seed) for seed in range(4)]
    matrices[2][:, 9] *= 30
    result = found(*matrices, scale=0.5)
    singular = np.sort(np.concatenate([by_numpy(matrix)[1] for matrix in matrices]))[::-1]
    first = result.columns.most_localised[0]
    assert (first.matrix, first.rank, first.channels[0].index) == (2, 1, 9)
    assert first.eigenvalue == pytest.approx(0.5 * singular[0] ** 2)
    in_tail = [by_numpy(matrix)[1] >= singular[59] for matrix in matrices]
    ratios = [(by_numpy(matrix)[0][1] ** 4).sum(axis=1)[part] for matrix, part in zip(matrices, in_tail, strict=True)]
    assert result.columns.tail.ipr == pytest.approx(np.concatenate(ratios).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_weights_are_converted(dtype: torch.dtype) -> None:
    matrix = torch.from_numpy(noise(80, 130)).to(dtype)
    result = found(matrix.double().numpy(), dtype=dtype)
    _, (_, right) = None, by_numpy(matrix.double().numpy())[0]
    ratios = (right**4).sum(axis=1)
    assert result.columns.tail.ipr == pytest.approx(ratios[:40].mean(), rel=1e-6)


def planted() -> dict[str, torch.Tensor]:
    """A LLaMA in whose second layer one input channel is huge."""
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][:, 11] *= 50
    return tensors


def test_an_analysis_has_them_only_when_asked() -> None:
    tensors = planted()
    plain, asked = esdtool.analyze(tensors), esdtool.analyze(tensors, vectors=True, jobs=2)
    assert {module.vectors for module in plain.modules} == {None}
    assert not any(name.startswith("vectors") for name in plain.flat_rows()[0])
    assert [module.alpha for module in plain.modules] == [module.alpha for module in asked.modules]
    module = next(each for each in asked.modules if each.name == "model.layers.1.mlp.up_proj")
    assert module.vectors.columns.most_localised[0].channels[0].index == 11
    # The tail is the one that alpha is of.
    assert module.vectors.rows.tail.count == module.num_tail
    row = next(row for row in asked.flat_rows() if row["name"] == module.name)
    assert row["vectors.columns.channel"] == 11
    assert row["vectors.rows.tail.ipr"] == module.vectors.rows.tail.ipr
    assert row["vectors.rows.channel"] is None
    assert Analysis.model_validate(json.loads(asked.to_json())).modules == asked.modules
    assert asked.to_json() == esdtool.analyze(tensors, vectors=True, jobs=1).to_json()
    properties = Analysis.model_json_schema(mode="serialization")["$defs"]
    assert set(properties["VectorGroup"]["properties"]) == set(VectorGroup.model_fields)


@pytest.mark.parametrize("fit", ["ks", "farms"])
def test_the_tail_is_that_of_the_fit(fit: str) -> None:
    weights = {"layers.0.mlp.up_proj.weight": torch.from_numpy(noise(220, 240) ** 3)}
    (module,) = esdtool.analyze(weights, fit=fit, vectors=True).modules
    singular = by_numpy(noise(220, 240) ** 3)[1]
    assert module.vectors.rows.tail.count == (singular**2 >= module.xmin * (1 - 1e-9)).sum()


def test_fast_moves_only_the_eigenvalues() -> None:
    tensors = planted()
    slow, fast = (esdtool.analyze(tensors, vectors=True, fast=fast) for fast in (False, True))
    assert any(module.spectrum == "gram-float32" for module in fast.modules)
    for one, other in zip(slow.modules, fast.modules, strict=True):
        assert other.vectors.columns.tail == one.vectors.columns.tail
        assert other.vectors.rows.bulk == one.vectors.rows.bulk


def test_what_is_not_scored_has_none() -> None:
    weights = {f"layers.{layer}.mlp.up_proj.weight": torch.from_numpy(noise(60, 80, seed=layer)) for layer in range(5)}
    weights["layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    weights["layers.2.mlp.up_proj.weight"].zero_()
    weights["layers.3.mlp.up_proj.weight"] = torch.eye(60)
    analysis = esdtool.analyze(weights, vectors=True, min_eigs=50)
    first, nan, zero, constant, last = (module.vectors for module in analysis.modules)
    assert nan is zero is None
    assert first.num_vectors == last.num_vectors == 60
    assert constant is None or constant.num_vectors == 0
    assert "nan" not in analysis_markdown(analysis)


def test_results_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESDTOOL_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "model.safetensors"
    save_file(planted(), path)
    esdtool.analyze(path)
    first = esdtool.analyze(path, vectors=True)  # the spectra are there, the vectors are not
    with monkeypatch.context() as patch:
        patch.setattr(module_of_vectors, "find_vectors", None)
        assert esdtool.analyze(path, vectors=True).to_json() == first.to_json()
        with pytest.raises(TypeError):
            esdtool.analyze(path, vectors=True, k_fraction=0.25)  # another tail
    other = esdtool.analyze(path, vectors=True, k_fraction=0.25).modules[0].vectors
    assert other.rows.tail.count < first.modules[0].vectors.rows.tail.count


def test_the_parts_of_fused_tensors_and_stacks_have_their_own() -> None:
    tensors = planted()
    names = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up")]
    fused = dict(tensors)
    fused["model.layers.1.mlp.gate_up_proj.weight"] = torch.cat([fused.pop(name) for name in names])
    alone, parts = (
        {module.name: module.vectors for module in esdtool.analyze(each, vectors=True).modules}
        for each in (tensors, fused)
    )
    assert parts == alone


def test_a_low_rank_update_has_none_and_the_report_says_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16, "lora_alpha": 16}')
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {"lora_A": noise(16, 64), "lora_B": noise(64, 16, seed=1)}
    save_file(
        {f"{name}.{key}.weight": torch.from_numpy(value).float() for key, value in factors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    analysis = esdtool.analyze(tmp_path, vectors=True)
    assert analysis.modules[0].vectors is None
    assert "No singular vectors of 1 low-rank updates" in analysis_markdown(analysis)


def test_the_reports_name_the_channel(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(planted(), path)
    shown = CliRunner().invoke(app, ["analyze", str(path), "--vectors", "--html", str(tmp_path / "page.html")])
    assert shown.exit_code == 0
    analysis = esdtool.analyze(path, vectors=True)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for text in (shown.stdout, analysis_markdown(analysis), page):
        assert "column 11 (100%)" in text
        assert "most localised singular vectors" in text
    assert "ingular vectors" not in analysis_page(esdtool.analyze(path))


@pytest.mark.parametrize("options", [{"spectrum": "slq"}, {"budget": 0.001}])
def test_estimates_have_no_vectors(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--vectors needs a full decomposition .* which --{next(iter(options))}"):
        esdtool.analyze(planted(), vectors=True, **options)
