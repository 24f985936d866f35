"""`esdtool compare` for checkpoints and analyses, as a user types it. Training runs: tests/train/run/."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import esdtool
from esdtool.cli import app
from esdtool.cli.compare_sources import sort_out
from esdtool.errors import EsdtoolError

Cli = Callable[..., subprocess.CompletedProcess[str]]
MOVED = "model.layers.1.mlp.up_proj"


@pytest.fixture
def pair(make_llama: Callable[..., dict[str, torch.Tensor]], tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and the same with one matrix replaced by noise and one module renamed."""
    old = make_llama(layers=2)
    new = dict(old)
    new[f"{MOVED}.weight"] = torch.randn(172, 64, generator=torch.Generator().manual_seed(1))
    new["model.layers.9.mlp.up_proj.weight"] = new.pop("model.layers.0.mlp.up_proj.weight")
    save_file(old, tmp_path / "old.safetensors")
    save_file(new, tmp_path / "new.safetensors")
    return tmp_path / "old.safetensors", tmp_path / "new.safetensors"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What makes a folder a run; it is not read before the sources are sorted out."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("")
    (folder / "metrics.jsonl").write_text("")
    return folder


def error_of(*arguments: object, code: int) -> str:
    """What a command that must fail says; in this process, since most of these fail before any work."""
    with pytest.raises(EsdtoolError) as caught:
        app([str(argument) for argument in ("compare", *arguments)], standalone_mode=False)
    assert caught.value.exit_code == code
    return str(caught.value)


def test_tables_and_words(esdtool_cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = esdtool_cli("compare", *pair, "--json", tmp_path / "c.json", "--sort", "difference", "--top", 3)
    assert (result.returncode, result.stderr) == (0, f"esdtool: wrote {tmp_path / 'c.json'}\n")
    document = json.loads((tmp_path / "c.json").read_text())
    moved = next(module for module in document["modules"] if module["name"] == MOVED)
    table = result.stdout.split("module by module, 3 of 13 modules")[1].split("mean alpha by role")[0]
    rows = [line.split() for line in table.splitlines() if line.strip().startswith("model.")]
    assert len(rows) == 3
    assert rows[0][0] == MOVED
    assert [float(cell.strip("*")) for cell in rows[0][4:7]] == pytest.approx(
        [moved["sides"][0]["alpha"], moved["sides"][1]["alpha"], moved["sides"][1]["difference"]], abs=6e-4
    )
    assert rows[0][6].endswith("*")
    assert not rows[1][6].endswith("*")
    assert "without a counterpart: 2 modules" in result.stdout
    assert "not in new.safetensors" in result.stdout
    assert "1 differs by more than 2 standard errors" in " ".join(result.stdout.split())


def test_analyses_and_checkpoints_mix(esdtool_cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = pair
    options = ("--fit", "ks", "--exclude", "layers\\.0")
    (tmp_path / "old.json").write_text(esdtool.analyze(old, fit="ks", exclude=["layers\\.0"]).to_json())
    direct = esdtool_cli("compare", old, new, *options, "--csv", "-")
    mixed = esdtool_cli("compare", tmp_path / "old.json", new, *options, "--csv", "-")
    assert (mixed.returncode, mixed.stderr) == (0, "")
    rows = list(csv.DictReader(io.StringIO(mixed.stdout)))
    # An analysis holds no weights to measure a distance of.
    whole = list(csv.DictReader(io.StringIO(direct.stdout)))
    assert [bool(row.pop("distances.relative_distance")) for row in whole] == [False, True] * 7
    assert rows == whole
    assert "is by ks: use --fit ks" in error_of(tmp_path / "old.json", new, code=2)


def test_markdown(esdtool_cli: Cli, pair: tuple[Path, Path]) -> None:
    result = esdtool_cli("compare", *pair, "--format", "markdown", "--top", 2)
    assert result.returncode == 0
    assert result.stdout.startswith("new.safetensors: alpha ")
    assert f"| `{MOVED}` | +" in result.stdout


def test_csv_on_stdout(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["compare", *map(str, pair), "--quiet", "--csv", str(tmp_path / "c.csv")], standalone_mode=False)
    app(["compare", *map(str, pair), "--format", "csv"], standalone_mode=False)
    assert capsys.readouterr().out == (tmp_path / "c.csv").read_text()


def test_what_concerns_runs_is_refused_for_checkpoints(pair: tuple[Path, Path]) -> None:
    message = error_of(*pair, "--against", "uniform", code=2)
    assert message == "--against concerns training runs, and these are checkpoints"


def test_a_folder_of_runs_is_its_runs(run_dir: Path) -> None:
    """Runs that have no result yet are left out, and that is said."""
    folder = run_dir.parent
    assert error_of(folder, code=1) == f"none of the 1 runs in {folder} has a validation result yet"
    second = folder / "sweep" / "seed-0"
    second.mkdir(parents=True)
    (second / "config.toml").write_text("")
    (second / "metrics.jsonl").write_text('{"step": 4, "split": "validation", "loss": 1.0}\n')
    found = sort_out([str(folder)])
    assert (found.runs, found.models) == ((str(second),), ())
    assert found.notes == (f"{run_dir} has no validation result yet: left out",)


def test_one_is_not_enough(pair: tuple[Path, Path], llama_dir: Path) -> None:
    for source in (pair[0], llama_dir):
        assert f"{source} is one checkpoint: a comparison needs at least two" in error_of(source, code=2)


def test_runs_and_checkpoints_do_not_mix(pair: tuple[Path, Path], run_dir: Path) -> None:
    said = error_of(pair[0], run_dir, code=2)
    assert f"{run_dir} is a training run and {pair[0]} is not" in said
    assert f"{run_dir / 'final'} with {pair[0]}" in said


@pytest.mark.parametrize("options", [("--fit", "hill"), ("-j", "1"), ("--no-split-fused",), ("--top", "3")])
def test_options_of_checkpoints_are_refused_for_runs(run_dir: Path, options: tuple[str, ...]) -> None:
    names = {"-j": "--jobs", "--no-split-fused": "--split-fused"}
    expected = f"{names.get(options[0], options[0])} concerns checkpoints, and these are training runs"
    assert error_of(run_dir, *options, code=2) == expected


def test_options_of_the_analysis_are_refused_where_nothing_is_analysed(
    esdtool_cli: Cli, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    name = tmp_path / "old.json"
    name.write_text(esdtool.analyze(pair[0]).to_json())
    assert "--k-fraction concerns checkpoints that are not analysed yet" in error_of(
        name, name, "--k-fraction", 0.5, code=2
    )
    same = esdtool_cli("compare", name, name, "--experts", "all")
    assert same.returncode == 0
    assert f"\n{pair[0].name} (2): all 14 alphas equal those of {pair[0].name} (1)." in same.stdout


def test_errors_of_single_sources(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert "no such file" in error_of(pair[0], tmp_path / "nowhere", code=1)
    (tmp_path / "empty").mkdir()
    assert "no run directory" in error_of(tmp_path / "empty", pair[0], code=1)
    (tmp_path / "t.json").write_text('{"format": "esdtool.trajectory"}')
    assert "esdtool.trajectory, but an analysis of one checkpoint" in error_of(pair[0], tmp_path / "t.json", code=1)
    assert "does not exist" in error_of(*pair, "--html", tmp_path / "no" / "x.html", code=1)


def test_nothing_in_common(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"encoder.layer.0.attention.self.query.weight": torch.randn(80, 80)}, tmp_path / "bert.safetensors")
    assert "has a scored counterpart" in error_of(pair[0], tmp_path / "bert.safetensors", code=3)
    assert "mean alpha by role" in capsys.readouterr().out
