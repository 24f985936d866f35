"""The CSV under WeightWatcher's column names, against numpy."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import esdtool
from esdtool.cli import app
from esdtool.errors import EsdtoolError, UsageError
from esdtool.report.tables.weightwatcher import COLUMNS, weightwatcher_csv


def rows_of(text: str) -> dict[str, dict[str, str]]:
    return {row["longname"]: row for row in csv.DictReader(io.StringIO(text))}


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.layers.0.mlp.up_proj.weight": torch.randn(120, 80, generator=generator) * torch.logspace(0, -1, 80),
        "model.layers.0.self_attn.q_proj.weight": torch.full((80, 80), float("nan")),
        "stem.conv.weight": torch.randn(64, 60, 3, 3, generator=generator),
    }


def test_columns_are_what_their_names_say_there(weights: dict[str, torch.Tensor]) -> None:
    rows = rows_of(weightwatcher_csv(esdtool.analyze(weights, fit="ks")))
    row = rows["model.layers.0.mlp.up_proj"]
    assert tuple(row) == COLUMNS
    assert list(COLUMNS[2:]) == sorted(COLUMNS[2:])
    singular = np.linalg.svd(weights["model.layers.0.mlp.up_proj.weight"].double().numpy(), compute_uv=False)
    eigenvalues = singular**2
    alpha = float(row["alpha"])
    expected = {
        "M": 80,
        "N": 120,
        "Q": 1.5,
        "rf": 1,
        "num_evals": 80,
        "norm": eigenvalues.sum(),
        "log_norm": np.log10(eigenvalues.sum()),
        "spectral_norm": eigenvalues.max(),
        "xmax": eigenvalues.max(),
        "log_spectral_norm": np.log10(eigenvalues.max()),
        "alpha_weighted": alpha * np.log10(eigenvalues.max()),
        "log_alpha_norm": np.log10((eigenvalues**alpha).sum()),
        "stable_rank": eigenvalues.sum() / eigenvalues.max(),
        "sv_max": singular.max(),
        "sv_min": singular.min(),
        "W_scale": np.sqrt(80 / eigenvalues.sum()),
        "num_pl_spikes": (eigenvalues >= float(row["xmin"]) * (1 - 1e-9)).sum(),
        "sigma": (alpha - 1) / np.sqrt(float(row["num_pl_spikes"])),
        "weak_rank_loss": 0,
        "matrix_rank": 80,
        "ERG_gap": float(row["detX_num"]) - float(row["num_pl_spikes"]),
    }
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-9)
    # The edge of the bulk in that tool's units.
    edge = float(row["sigma_mp"]) ** 2 * (1 + (80 / 120) ** 0.5) ** 2 / float(row["W_scale"]) ** 2
    assert edge == pytest.approx(float(row["bulk_max"]))
    assert (row["name"], row["layer_type"], row["status"], row["has_esd"]) == ("up_proj", "dense", "success", "True")


def test_kernels_and_what_cannot_be_scored_have_rows(weights: dict[str, torch.Tensor]) -> None:
    rows = rows_of(weightwatcher_csv(esdtool.analyze(weights, fit="ks")))
    conv = rows["stem.conv"]
    assert [conv[name] for name in ("layer_type", "M", "N", "rf", "num_evals")] == ["conv2d", "60", "64", "9", "540"]
    failed = rows["model.layers.0.self_attn.q_proj"]
    assert (failed["status"], failed["alpha"]) == ("failed", "")
    assert "NaN" in failed["warning"]
    assert [row["layer_id"] for row in rows.values()] == ["1", "2", "3"]


def test_lambda_is_that_of_the_truncated_power_law() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"model.layers.0.mlp.up_proj.weight": torch.randn(60, 50, generator=generator).exp()}
    analysis = esdtool.analyze(weights, fit=["ks", "tpl"])
    (row,) = rows_of(weightwatcher_csv(analysis)).values()
    assert float(row["Lambda"]) == analysis.modules[0].fits["tpl"].truncation_lambda
    (row,) = rows_of(weightwatcher_csv(esdtool.analyze(weights, fit="ks"))).values()
    assert row["Lambda"] == ""


def test_another_alpha_is_refused(weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UsageError, match="make ks the first --fit"):
        weightwatcher_csv(esdtool.analyze(weights))


def test_the_option_takes_ks_by_itself(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source, target = tmp_path / "model.safetensors", tmp_path / "ww.csv"
    save_file(weights, source)
    app(["analyze", str(source), "-q", "--weightwatcher-columns", str(target)], standalone_mode=False)
    assert target.read_text() == weightwatcher_csv(esdtool.analyze(source, fit="ks"))
    for words in (["--fit", "hill"], [str(source)]):
        with pytest.raises(EsdtoolError, match=r"ks the first|one checkpoint at a time"):
            app(["analyze", str(source), *words, "-q", "--weightwatcher-columns", str(target)], standalone_mode=False)
