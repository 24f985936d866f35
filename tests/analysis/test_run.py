"""Whole analyses: the Python API, its invariances, and real pretrained models."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import esdtool
from esdtool.analysis.document import Analysis
from esdtool.analysis.plan import make_plan
from esdtool.analysis.run import run
from esdtool.errors import CheckpointError, DeviceError, NothingToAnalyzeError, UsageError
from esdtool.schemas.__main__ import rendered, schemas
from esdtool.spectra.options import ScoreOptions
from esdtool.support.devices import resolve_device


def svd_alpha(matrix: torch.Tensor) -> float:
    """Hill's alpha by its definition, from numpy's float64 SVD."""
    eigenvalues = np.sort(np.linalg.svd(matrix.to(torch.float64).numpy(), compute_uv=False) ** 2)
    start = len(eigenvalues) // 2
    tail = eigenvalues[start:]
    return float(1 + len(tail) / np.log(tail / tail[0]).sum())


def test_every_module_of_the_bundled_checkpoint(bundled: Path) -> None:
    weights = load_file(bundled / "model.safetensors")
    exact, fast = esdtool.analyze(bundled), esdtool.analyze(bundled, fast=True)
    assert len(exact.modules) == 7 * json.loads((bundled / "config.json").read_text())["num_hidden_layers"]
    for module, quick in zip(exact.modules, fast.modules, strict=True):
        expected = svd_alpha(weights[module.parameter])
        assert module.alpha == pytest.approx(expected, rel=1e-6)
        assert quick.alpha == pytest.approx(expected, rel=1e-4)
        assert (module.spectrum, quick.spectrum) == ("gram-float64", "gram-float32")


def test_ks_of_the_bundled_checkpoint_in_both_precisions(bundled: Path) -> None:
    exact, fast = (esdtool.analyze(bundled, fit="ks", fast=fast) for fast in (False, True))
    for module, quick in zip(exact.modules, fast.modules, strict=True):
        assert quick.alpha == pytest.approx(module.alpha, rel=1e-4)
        assert quick.num_tail == module.num_tail


def test_training_shows_in_the_bundled_checkpoint(bundled: Path) -> None:
    """A trained model has heavier tails than the untrained null; otherwise it would be a poor example."""
    for row in esdtool.analyze(bundled).summary.by_role:
        if row.role in ("q_proj", "k_proj"):
            assert row.mean_mp_alpha is not None
            assert row.mean_alpha < row.mean_mp_alpha


def test_every_tensor_is_scored_or_skipped(llama_dir: Path) -> None:
    analysis = esdtool.analyze(llama_dir)
    names = [module.parameter for module in analysis.modules] + [tensor.name for tensor in analysis.skipped]
    assert sorted(names) == sorted(load_file(llama_dir / "model.safetensors"))
    assert all(tensor.reason for tensor in analysis.skipped)
    assert [module.layer for module in analysis.modules] == [0] * 7 + [1] * 7
    assert [module.role for module in analysis.modules[:7]] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]


def test_path_state_dict_and_live_model_agree(llama_dir: Path) -> None:
    weights = load_file(llama_dir / "model.safetensors")
    by_path, by_dict = esdtool.analyze(llama_dir), esdtool.analyze(weights)
    assert [m.alpha for m in by_path.modules] == [m.alpha for m in by_dict.modules]
    linear = torch.nn.Sequential(torch.nn.Linear(80, 60), torch.nn.ReLU(), torch.nn.Linear(60, 70))
    live = esdtool.analyze(linear)
    assert [module.name for module in live.modules] == ["0", "2"]
    for module, layer in zip(live.modules, (linear[0], linear[2]), strict=True):
        assert module.alpha == pytest.approx(svd_alpha(layer.weight.detach()), rel=1e-9)


def test_shards_and_order_do_not_matter(llama_dir: Path, tmp_path: Path) -> None:
    weights = load_file(llama_dir / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    names = list(reversed(weights))
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: weights[name] for name in members}, sharded / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert esdtool.analyze(sharded).modules == esdtool.analyze(llama_dir).modules


def test_the_same_input_gives_the_same_bytes_with_any_number_of_jobs(llama_dir: Path) -> None:
    texts = {esdtool.analyze(llama_dir, jobs=jobs).to_json() for jobs in (1, 2, 5)}
    assert len(texts) == 1


def test_json_round_trip_and_schema(llama_dir: Path, tmp_path: Path) -> None:
    analysis = esdtool.analyze(llama_dir, fit=["hill", "ks", "powerlaw"])
    path = tmp_path / "analysis.json"
    path.write_text(analysis.to_json())
    assert Analysis.from_json(path).to_json() == analysis.to_json()
    document = json.loads(path.read_text())
    schema = json.loads(files("esdtool.schemas").joinpath("analysis.schema.json").read_text())
    jsonschema.validate(document, schema)
    assert document["format"] == "esdtool.analysis"
    assert document["version"] == 1
    module = document["modules"][0]
    assert module["name"] == "model.layers.0.self_attn.q_proj"
    assert module["parameter"] == "model.layers.0.self_attn.q_proj.weight"
    assert set(module["alphas"]) == {"hill", "ks", "powerlaw"}
    assert module["alpha"] == module["alphas"]["hill"]
    assert set(module["comparisons"]) <= {"lognormal", "exponential", "truncated_power_law"}


@pytest.mark.parametrize("name", schemas())
def test_shipped_schemas_are_those_of_the_code(name: str) -> None:
    shipped = files("esdtool.schemas").joinpath(f"{name}.schema.json").read_text()
    assert shipped == rendered(schemas()[name]), "run: python -m esdtool.schemas"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an esdtool analysis"),
        ('{"format": "esdtool.weight_decay"}', "not an esdtool analysis"),
        ('{"format": "esdtool.analysis", "version": 2}', "version 2 is not supported"),
        ('{"format": "esdtool.analysis", "version": 1}', "invalid analysis at created_by"),
    ],
)
def test_files_that_are_no_analysis(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "analysis.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=words):
        Analysis.from_json(path)


def test_degenerate_modules_stay_in_the_list_with_words(make_llama) -> None:
    weights = make_llama()
    weights["model.layers.0.self_attn.q_proj.weight"][3, 4] = math.nan
    weights["model.layers.0.self_attn.k_proj.weight"].zero_()
    weights["model.layers.0.self_attn.v_proj.weight"][:, 1:] = 0
    weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(1, 64)
    analysis = esdtool.analyze(weights)
    status = {module.name.removeprefix("model.layers."): module.status for module in analysis.modules}
    assert "NaN" in status["0.self_attn.q_proj"]
    assert "zero" in status["0.self_attn.k_proj"]
    assert "rank-deficient" in status["0.self_attn.v_proj"]
    assert "too few" in status["1.mlp.up_proj"]
    assert sum(words == "ok" for words in status.values()) == 10
    broken = next(module for module in analysis.modules if not module.ok)
    numbers = broken.model_dump(include={"alpha", "xmin", "stable_rank", "lambda_max", "mp_alpha", "frobenius_norm"})
    assert set(numbers.values()) == {None}
    assert analysis.summary.num_scored == 10
    assert analysis.summary.num_modules == 14


def test_convolutions_pool_kernel_positions_by_the_documented_convention() -> None:
    convolution = torch.nn.Conv2d(70, 60, 3)
    analysis = esdtool.analyze(convolution)
    (module,) = analysis.modules
    weight = convolution.weight.detach().double().numpy()
    pooled = [np.linalg.svd(weight[:, :, i, j], compute_uv=False) ** 2 * 0.5 for i in range(3) for j in range(3)]
    np.testing.assert_allclose(analysis.esds[module.name], np.sort(np.concatenate(pooled)), rtol=1e-9)
    assert module.num_eigs == 9 * 60


def test_warnings_are_those_of_ks_alone() -> None:
    light = torch.from_numpy(np.diag(np.linspace(1.0, 1.2, 80)))
    assert esdtool.analyze({"a.weight": light}, fit="ks").modules[0].warning == "under-trained"
    heavy = torch.from_numpy(np.diag(1 / np.arange(1.0, 81)))
    assert esdtool.analyze({"a.weight": heavy}, fit=["hill", "ks"]).modules[0].warning == "over-trained"
    assert esdtool.analyze({"a.weight": heavy}, fit="hill").modules[0].warning is None


def test_summary_counts_and_extremes(llama_dir: Path) -> None:
    analysis = esdtool.analyze(llama_dir)
    alphas = {module.name: module.alpha for module in analysis.modules}
    ranked = sorted(alphas, key=alphas.__getitem__)
    assert analysis.summary.most_heavy_tailed == tuple(ranked[:3])
    assert analysis.summary.least_heavy_tailed == tuple(reversed(ranked[-3:]))
    assert analysis.summary.mean_alpha == pytest.approx(np.mean(list(alphas.values())))
    by_role = {row.role: row for row in analysis.summary.by_role}
    chosen = [module.alpha for module in analysis.modules if module.role == "up_proj"]
    assert by_role["up_proj"].mean_alpha == pytest.approx(np.mean(chosen))
    assert by_role["up_proj"].std_alpha == pytest.approx(np.std(chosen))
    assert [row.layer for row in analysis.summary.by_layer] == [0, 1]


def test_to_pandas_and_csv(llama_dir: Path) -> None:
    analysis = esdtool.analyze(llama_dir, fit=["hill", "ks"])
    frame = analysis.to_pandas()
    assert list(frame["alphas.ks"]) == [module.alphas["ks"] for module in analysis.modules]
    lines = analysis.to_csv().splitlines()
    assert len(lines) == 15
    assert lines[0].split(",") == list(frame.columns)


def test_memory_prediction_and_plan_read_no_weights(llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(llama_dir, ScoreOptions(), jobs=2)
    monkeypatch.setattr(type(plan.checkpoint), "read", lambda *_: pytest.fail("a plan reads headers only"))
    assert plan.cost > 0
    assert plan.peak_bytes > 2 * 172 * 64 * 4


def test_an_error_in_one_tensor_stops_the_analysis(llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(llama_dir, ScoreOptions())

    def broken(self: object, name: str) -> torch.Tensor:
        raise CheckpointError(f"model.safetensors: tensor {name!r} cannot be read")

    monkeypatch.setattr(type(plan.checkpoint), "read", broken)
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(plan)


def test_thread_settings_are_restored(llama_dir: Path) -> None:
    before = torch.get_num_threads()
    esdtool.analyze(llama_dir)
    assert torch.get_num_threads() == before


def test_nothing_to_analyse() -> None:
    with pytest.raises(NothingToAnalyzeError, match="no weight matrix"):
        esdtool.analyze({"norm.weight": torch.ones(8)})


@pytest.mark.parametrize("device", ["cuda:99", "quantum", "meta"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises((DeviceError, UsageError), match="device"):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is present")
def test_cuda_asked_for_but_absent() -> None:
    with pytest.raises(DeviceError, match="--device cpu"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"
