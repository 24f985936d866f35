"""`esdtool assign` as a user types it: the latest analysis, the formats, the formulas, `--check`, one-line errors."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import esdtool

Q_PROJ_0 = "model.layers.0.self_attn.q_proj.weight"
BASE, MIN_RATIO, MAX_RATIO = 0.1, 0.67, 5.0


@pytest.fixture
def checkpoint(llama_dir: Path) -> Path:
    """`llama_dir` with layer 0's q_proj of the smallest alpha, so that leaving it out moves the minimum."""
    weights = load_file(llama_dir / "model.safetensors")
    weights[Q_PROJ_0] = weights[Q_PROJ_0] * torch.logspace(0, -2, 64)
    save_file(weights, llama_dir / "model.safetensors")
    return llama_dir


@pytest.fixture
def analysis(checkpoint: Path, tmp_path: Path) -> Path:
    """The analysis JSON of `checkpoint`."""
    path = tmp_path / "analysis.json"
    path.write_text(esdtool.analyze(checkpoint).to_json())
    return path


def hill_alphas(folder: Path) -> dict[str, float]:
    """alpha = 1 + k / sum ln(lambda_j / lambda_i), i = n // 2, of every block matrix; by numpy's SVD in float64."""
    alphas = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if ".layers." in name and weight.ndim == 2:
            eigenvalues = np.sort(np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2)
            tail = eigenvalues[len(eigenvalues) // 2 :]
            alphas[name] = 1 + len(tail) / np.log(tail / tail[0]).sum()
    return alphas


def linear(alphas: np.ndarray) -> np.ndarray:
    return BASE * (MIN_RATIO + (alphas - alphas.min()) / (alphas.max() - alphas.min()) * (MAX_RATIO - MIN_RATIO))


def share(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda alphas: BASE * len(alphas) * function(alphas) / function(alphas).sum()


FORMULAS = {"linear": linear, "sqrt": share(np.sqrt), "log2": share(np.log2)}


def printed(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The assignment on stdout of a successful command."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def decays(document: dict[str, Any]) -> dict[str, float]:
    return {name: entry["weight_decay"] for name, entry in document["parameters"].items()}


def one_line_error(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The error of a failed command: one line, after at most the remark which analysis was taken; no traceback."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    *remarks, line = result.stderr.splitlines()
    assert all(remark.startswith("esdtool: using your latest analysis: ") for remark in remarks)
    assert line.startswith("esdtool: error: ")
    return line


def test_analyze_then_assign_without_source(esdtool_cli, checkpoint: Path, own_cache: Path, tmp_path: Path) -> None:
    """The two commands of the README, exactly as typed."""
    assert esdtool_cli("analyze", checkpoint, cwd=tmp_path).returncode == 0
    result = esdtool_cli("assign", "--out", "wd.json", cwd=tmp_path)
    assert result.returncode == 0
    made = datetime.fromtimestamp((own_cache / "latest-analysis.json").stat().st_mtime).astimezone()
    first, *warnings, last = result.stderr.splitlines()
    assert first == f"esdtool: using your latest analysis: {checkpoint}, of {made:%Y-%m-%d %H:%M}"
    assert last == "esdtool: wrote wd.json"
    assert all(line.startswith("esdtool: warning: ") for line in warnings)
    written = json.loads((tmp_path / "wd.json").read_text())
    assert (written["format"], written["version"]) == ("esdtool.weight_decay", 1)
    assert written["source"]["checkpoint"] == str(checkpoint)
    assert decays(written) == pytest.approx(decays(printed(esdtool_cli("assign", checkpoint, "--out", "-"))), rel=1e-12)


def test_tables(esdtool_cli, analysis: Path, checkpoint: Path) -> None:
    result = esdtool_cli("assign", analysis)
    *warnings, last = result.stderr.splitlines()
    assert last == "esdtool: nothing was written: name a file with --out wd.json"
    assert [line.split(":")[1] for line in warnings] == [" warning", " warning"]  # random weights; the mean decay
    table, picture = result.stdout.split("decay by layer and role")
    expected = dict(zip(hill_alphas(checkpoint), linear(np.array(list(hill_alphas(checkpoint).values()))), strict=True))
    for name, decay in expected.items():
        (row,) = [line for line in table.splitlines() if name in line]
        assert float(row.split()[3]) == pytest.approx(decay, rel=1e-3)
    assert "█" * 24 in table
    header, _, *rows = [line for line in picture.splitlines() if line.strip()]
    assert header.split() == ["layer", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for layer in range(2):
        cells = [float(cell) for cell in rows[layer].replace("■", "").split()]
        assert cells[0] == layer
        of_layer = [decay for name, decay in expected.items() if f".layers.{layer}." in name]
        assert sorted(cells[1:]) == pytest.approx(sorted(of_layer), rel=1e-2)
    assert "14 parameters, decays 0.067 to 0.5, decoupled (AdamW)" in " ".join(picture.split())


def test_quiet_prints_nothing(esdtool_cli, analysis: Path, tmp_path: Path) -> None:
    result = esdtool_cli("assign", analysis, "--quiet", "--out", tmp_path / "wd.json")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "wd.json").exists()


@pytest.mark.parametrize("formula", FORMULAS)
def test_decays_are_those_of_the_paper(esdtool_cli, checkpoint: Path, formula: str) -> None:
    """From the weights to the file, against numpy alone."""
    document = printed(esdtool_cli("assign", checkpoint, "--assign", formula, "--out", "-"))
    alphas = hill_alphas(checkpoint)
    assert len(alphas) == 14
    assert {name: entry["alpha"] for name, entry in document["parameters"].items()} == pytest.approx(alphas, rel=1e-5)
    expected = FORMULAS[formula](np.array(list(alphas.values())))
    assert decays(document) == pytest.approx(dict(zip(alphas, expected, strict=True)), rel=1e-5)


def test_leaving_out_the_first_q_proj(esdtool_cli, analysis: Path, checkpoint: Path) -> None:
    """The public code drops the first Linear, layer 0's q_proj, before it takes minimum and maximum."""
    options = ("assign", analysis, "--exclude", r"layers\.0\.self_attn\.q_proj", "--out", "-")
    document = printed(esdtool_cli(*options))
    alphas = hill_alphas(checkpoint)
    assert min(alphas, key=alphas.__getitem__) == Q_PROJ_0
    del alphas[Q_PROJ_0]
    expected = dict(zip(alphas, linear(np.array(list(alphas.values()))), strict=True))
    assert decays(document) == pytest.approx(expected, rel=1e-5)
    assert min(decays(document).values()) == pytest.approx(MIN_RATIO * BASE, rel=1e-12)
    assert "layers" in document["left_out"][Q_PROJ_0]


def test_options_reach_the_file(esdtool_cli, analysis: Path) -> None:
    options = ("--optimizer", "adam", "--weight-decay", "1e-5", "--unlisted", "no-decay", "--granularity", "role")
    document = printed(esdtool_cli("assign", analysis, *options, "--out", "-"))
    assert (document["optimizer"], document["base_weight_decay"]) == ("l2", 1e-5)
    assert (document["method"]["min_ratio"], document["method"]["max_ratio"]) == (0.67, 3.0)
    assert document["method"]["granularity"] == "role"
    assert document["default"]["weight_decay"] == 0.0
    assert min(decays(document).values()) == pytest.approx(0.67e-5)
    assert max(decays(document).values()) == pytest.approx(3e-5)
    assert len(set(decays(document).values())) == 7
    assert set(document["parameters"]) & {"model.norm.weight", "lm_head.weight"} == set()

    document = printed(esdtool_cli("assign", analysis, "--normalize", "--score", "stable_rank", "--out", "-"))
    sizes = [np.prod(entry["shape"]) for entry in document["parameters"].values()]
    assert np.average(list(decays(document).values()), weights=sizes) == pytest.approx(BASE, rel=1e-12)
    assert document["method"]["score"] == "stable_rank"

    document = printed(esdtool_cli("assign", analysis, "--weight-decay", 0, "--out", "-"))
    assert set(decays(document).values()) == {0.0}


def test_formats(esdtool_cli, analysis: Path, tmp_path: Path) -> None:
    reference = decays(printed(esdtool_cli("assign", analysis, "--out", "-")))
    rows = list(csv.DictReader(io.StringIO(esdtool_cli("assign", analysis, "--format", "csv", "--out", "-").stdout)))
    assert {row["parameter"]: float(row["weight_decay"]) for row in rows} == reference
    assert {row["shape"] for row in rows} == {"64x64", "172x64", "64x172"}

    path = tmp_path / "groups.json"
    assert (
        esdtool_cli("assign", analysis, "--format", "torch-groups", "--assign", "uniform", "-o", path).returncode == 0
    )
    (group,) = json.loads(path.read_text())
    assert group == {"weight_decay": BASE, "params": list(reference)}


def test_stdout_of_latest_is_nothing_but_json(esdtool_cli, checkpoint: Path) -> None:
    esdtool_cli("analyze", checkpoint, "--quiet")
    result = esdtool_cli("assign", "--out", "-")
    assert len(printed(result)["parameters"]) == 14
    assert re.match(r"esdtool: using your latest analysis: .*\n(esdtool: warning: .*\n)*\Z", result.stderr)


def test_check(esdtool_cli, checkpoint: Path, tmp_path: Path) -> None:
    """--check against the right checkpoint, one of other shapes, one of other names, and one with more blocks."""
    path = tmp_path / "wd.json"
    esdtool.assign(esdtool.analyze(checkpoint)).save(path)
    weights = load_file(checkpoint / "model.safetensors")

    def check(name: str, tensors: dict[str, torch.Tensor]) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / name
        folder.mkdir()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return esdtool_cli("assign", "--check", path, "--model", folder)

    right = check("right", weights)
    assert (right.returncode, right.stderr) == (0, "")
    assert right.stdout == "14 parameters match in name and shape; 5 others fall under the default.\n"

    shape = check("shape", weights | {Q_PROJ_0: torch.randn(64, 32)})
    assert shape.returncode == 1
    assert shape.stderr.count("\n") == 1
    assert f"{Q_PROJ_0} is 64x64 in the file, 64x32 in the model" in shape.stderr
    assert "64x64 in the file, 64x32 in the model" in " ".join(shape.stdout.split())

    renamed = check("renamed", {name.replace("layers.1.", "layers.7."): tensor for name, tensor in weights.items()})
    assert renamed.returncode == 1
    assert "model.layers.1.self_attn.q_proj.weight is not in the model (and 6 more)" in renamed.stderr
    assert renamed.stdout.count("in the file, not in the model") == 7
    assert renamed.stdout.count("in the model, not in the file") == 7

    more = check("more", weights | {Q_PROJ_0.replace("layers.0", "layers.2"): torch.randn(64, 64)})
    assert more.returncode == 1
    assert "model.layers.2.self_attn.q_proj.weight of the model is not in the file" in more.stderr


def test_bad_input_is_one_line(esdtool_cli, analysis: Path, checkpoint: Path, tmp_path: Path) -> None:
    wrong_version = tmp_path / "version.json"
    wrong_version.write_text(json.dumps({"format": "esdtool.weight_decay", "version": 3}))
    negative = tmp_path / "negative.json"
    entry = {"weight_decay": -1.0, "shape": [64, 64]}
    document = {
        "format": "esdtool.weight_decay",
        "version": 1,
        "base_weight_decay": 0.1,
        "parameters": {Q_PROJ_0: entry},
    }
    negative.write_text(json.dumps(document))
    wd = tmp_path / "wd.json"
    esdtool.assign(esdtool.Analysis.from_json(analysis)).save(wd)
    unscored = tmp_path / "unscored.json"
    text = json.loads(analysis.read_text())
    for module in text["modules"]:
        module |= {"status": "all zero", "alpha": None, "alphas": {}}
    unscored.write_text(json.dumps(text))
    cases: list[tuple[list[Any], int, str]] = [
        ([], 1, "no analysis yet: run 'esdtool analyze CHECKPOINT' first"),
        ([tmp_path / "missing"], 1, "missing"),
        ([wd], 1, "not an esdtool analysis"),
        ([unscored], 3, "no module was scored"),
        ([analysis, "--min-ratio", 3, "--max-ratio", 2], 2, "min-ratio 3.0 is more than max-ratio 2.0"),
        ([analysis, "--min-ratio", "-1"], 2, "not negative"),
        ([analysis, "--assign", "sqrt", "--max-ratio", 2], 2, "belong to the linear assignment"),
        ([analysis, "--assign", "cubic"], 2, "--assign"),
        ([analysis, "--weight-decay", "nan"], 2, "must be finite"),
        ([analysis, "--weight-decay", "-0.1"], 2, "not negative"),
        ([analysis, "--fit", "ks"], 2, "analyse again with --fit ks"),
        ([checkpoint, "--fit", "hil"], 2, "unknown fit 'hil'"),
        ([analysis, "--include", "no_such"], 2, "--include 'no_such' matches no analysed parameter"),
        ([analysis, "--exclude", "no_such"], 2, "--exclude 'no_such' matches no analysed parameter"),
        ([analysis, "--exclude", "("], 2, "not a regular expression"),
        ([analysis, "--out", tmp_path], 1, "is a directory"),
        ([analysis, "--out", tmp_path / "no" / "wd.json"], 1, "does not exist"),
        (["--check", wd], 2, "go together"),
        (["--model", checkpoint], 2, "go together"),
        (["--check", wd, "--model", checkpoint, "--out", tmp_path / "o.json"], 2, "--check"),
        ([analysis, "--check", wd, "--model", checkpoint], 2, "--check"),
        (["--check", tmp_path / "gone.json", "--model", checkpoint], 1, "gone.json"),
        (["--check", wrong_version, "--model", checkpoint], 1, "version 3 is not supported"),
        (["--check", negative, "--model", checkpoint], 1, Q_PROJ_0),
    ]
    for arguments, code, words in cases:
        line = one_line_error(esdtool_cli("assign", *arguments), code)
        assert words in line, (arguments, line)


def test_options_are_checked_before_the_spectra(esdtool_cli, checkpoint: Path) -> None:
    """A contradiction must not cost an analysis: here the analysis itself would fail on the ruined file."""
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    for options in (("--min-ratio", 6), ("--assign", "log2", "--min-ratio", 1), ("--max-ratio", "nan")):
        line = one_line_error(esdtool_cli("assign", checkpoint, *options), 2)
        assert "model.safetensors" not in line


def test_a_failed_command_leaves_the_old_file(esdtool_cli, analysis: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    target = folder / "wd.json"
    target.write_text("old")
    one_line_error(esdtool_cli("assign", analysis, "--out", target, "--exclude", "."), 3)
    assert target.read_text() == "old"
    assert [path.name for path in folder.iterdir()] == ["wd.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout_is_one_line(analysis: Path) -> None:
    command = f"exec 1>/dev/full; {sys.executable} -m esdtool assign {analysis} --out -"
    result = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "No space left" in result.stderr
