"""The JSONL file of SpectralMonitor as a source of `plot` and `compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esdtool
from esdtool.cli import app
from esdtool.comparison.monitor_log import last_of_log, read_monitor_log, trajectory_of_log
from esdtool.errors import CheckpointError
from esdtool.optim import JsonLinesWriter


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[esdtool.Analysis]]:
    """Two logs of two readings each, and analyses of the weights at the last ones."""
    paths, analyses = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(60, 64, bias=False), nn.Linear(64, 60, bias=False)])})
        path = tmp_path_factory.mktemp("logs") / f"seed-{seed}.jsonl"
        monitor = esdtool.SpectralMonitor(model, every=10, writers=[JsonLinesWriter(path)])
        for step in range(1, 21):
            with torch.no_grad():
                for weight in model.parameters():
                    weight[0] += 0.01
            assert (monitor.step() is not None) == (step % 10 == 0)
        monitor.close()
        paths.append(path)
        analyses.append(esdtool.analyze(model))
    return paths, analyses


def test_a_log_is_read_as_analyses(logs: tuple[list[Path], list[esdtool.Analysis]]) -> None:
    (path, _), (analysis, _) = logs
    assert list(read_monitor_log(path)) == [10, 20]
    found = last_of_log(path)
    for ours, theirs in zip(found.modules, analysis.modules, strict=True):
        for name in ("name", "role", "layer", "shape", "num_eigs", "status"):
            assert getattr(ours, name) == getattr(theirs, name)
        for name in ("alpha", "alpha_stderr", "mp_alpha", "stable_rank", "spectral_norm"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-9)
    assert found.summary.mean_alpha == pytest.approx(analysis.summary.mean_alpha, rel=1e-9)
    assert [step.step for step in trajectory_of_log(path).steps] == [10, 20]


def test_plot_and_compare_read_it(
    logs: tuple[list[Path], list[esdtool.Analysis]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, analyses = logs
    out = tmp_path / "comparison.json"
    app(["compare", *map(str, paths), "--json", str(out)], standalone_mode=False)
    found = json.loads(out.read_text())
    means = [analysis.summary.mean_alpha for analysis in analyses]
    assert found["summary"]["mean_alphas"] == pytest.approx(means, rel=1e-9)
    app(["plot", str(paths[0]), "--out", str(tmp_path / "figures"), "--kind", "alpha-steps"], standalone_mode=False)
    (figure,) = (tmp_path / "figures").iterdir()
    assert figure.suffix == ".png"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no reading"),
        ('{"format": "esdtool.monitor", "version": 9}\n', "version 9 is not supported"),
        ('{"step": 1}\n{"step": 2}\n', "line 1 is no line of a SpectralMonitor"),
        ('{"format": "esdtool.monitor", "version": 1}\n[]\n', "line 2 is no line"),
        ('{"format": "esdtool.monitor", "version": 1}\n{"step": 1\n{"step": 2}\n', "line 2 is not JSON"),
        ('{"format": "esdtool.monitor", "version": 1}\n{"step": 1, "modules": {}}\n', "damaged log"),
        ('{"format": "esdtool.monitor", "version": 1}\n{"step": 1', "no reading"),
    ],
)
def test_what_is_no_log_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_monitor_log(path)


def test_what_a_later_attempt_replaced_is_void(logs: tuple[list[Path], Any], tmp_path: Path) -> None:
    header, first, second = logs[0][0].read_text().splitlines()
    path = tmp_path / "log.jsonl"
    again = json.dumps({**json.loads(header), "start_step": 10})
    path.write_text("\n".join([header, first, second, again]) + "\n")
    assert list(read_monitor_log(path)) == [10]
    path.write_text("\n".join([header, first, second, header]) + "\n")
    with pytest.raises(CheckpointError, match="no reading"):
        read_monitor_log(path)
