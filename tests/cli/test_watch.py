"""`esdtool watch`: whole checkpoints only, each analysed once, whatever comes and goes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import esdtool
from esdtool.analysis import run as analysis_run
from esdtool.cli import app
from esdtool.comparison.journal import Journal
from esdtool.comparison.landed import landings
from esdtool.errors import FindingsError, NothingToAnalyzeError, UsageError
from esdtool.spectra.options import ScoreOptions

Save = Callable[..., Path]


@pytest.fixture
def save(make_llama: Any) -> Save:
    """Write a small checkpoint folder that is old enough to be whole."""

    def write(folder: Path, *, seed: int = 0) -> Path:
        folder.mkdir(parents=True)
        save_file(make_llama(layers=1, seed=seed), folder / "model.safetensors")
        age(folder)
        return folder

    return write


def age(folder: Path) -> None:
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))


@pytest.fixture
def analysed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all checkpoints that are analysed, in order."""
    names: list[str] = []
    original = analysis_run.run

    def counted(plan: Any, **options: Any) -> Any:
        names.append(Path(plan.checkpoint.location).name)
        return original(plan, **options)

    monkeypatch.setattr(analysis_run, "run", counted)
    return names


def watch(*arguments: object) -> None:
    app(["watch", *map(str, arguments)], standalone_mode=False)


def points(run: Path) -> list[str]:
    return [Path(path).name for path in Journal(str(run), ScoreOptions()).read()]


def test_each_checkpoint_is_analysed_once_and_points_stay(
    save: Save, tmp_path: Path, analysed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for seed, step in enumerate((100, 20)):
        save(run / f"checkpoint-{step}", seed=seed)
    page = tmp_path / "live.html"
    watch(run, "--once", "--html", page)
    assert sorted(analysed) == ["checkpoint-100", "checkpoint-20"]
    shutil.rmtree(run / "checkpoint-20")  # as trainers prune
    save(run / "checkpoint-300", seed=2)
    capsys.readouterr()
    watch(run, "--once", "--html", page)
    assert analysed[2:] == ["checkpoint-300"]
    assert points(run) == ["checkpoint-20", "checkpoint-100", "checkpoint-300"]
    out, err = capsys.readouterr()
    assert "3 checkpoints" in out
    assert "checkpoint-300: mean alpha" in err
    assert f"wrote {page}" in err
    text = page.read_text()
    for step in (20, 100, 300):
        assert f"checkpoint-{step}" in text
    assert "<polyline" in text
    assert 'http-equiv="refresh"' not in text
    again = save(tmp_path / "other" / "checkpoint-100", seed=9)
    os.utime(again / "model.safetensors", (1.1e9, 1.1e9))
    (again / "model.safetensors").replace(run / "checkpoint-100" / "model.safetensors")
    watch(run, "--once", "--quiet")
    assert analysed[3:] == ["checkpoint-100"]  # other weights under the name
    assert len(points(run)) == 3


def test_numbers_are_those_of_analyze(save: Save, tmp_path: Path) -> None:
    folder = save(tmp_path / "run" / "step_5")
    watch(tmp_path / "run", "--once", "--quiet")
    (found,) = Journal(str(tmp_path / "run"), ScoreOptions()).read().values()
    expected = esdtool.analyze(str(folder))
    assert {module.name: module.alpha for module in found.modules} == {
        module.name: module.alpha for module in expected.modules
    }
    assert found.findings is not None


def test_it_waits_for_a_folder_and_for_whole_checkpoints(
    save: Save, tmp_path: Path, analysed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "later"
    half = run / "step_2"

    def truncated() -> None:
        save(half)
        data = (half / "model.safetensors").read_bytes()
        (half / "model.safetensors").write_bytes(data[: len(data) // 2])
        age(half)

    def shard() -> None:
        folder = save(run / "step_3")
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")

    def finished() -> None:
        save(run / "final", seed=1)
        for name in ("config.toml", "metrics.jsonl"):
            (run / name).touch()
        shutil.rmtree(half)
        save(half, seed=3)

    events = [
        lambda: save(run / "step_1"),
        truncated,
        shard,
        lambda: save(run / "tmp-step_4"),
        lambda: os.utime(save(run / "step_5", seed=2) / "model.safetensors"),  # just written
        finished,
    ]
    looks: list[list[str]] = []

    def pause(seconds: float) -> None:
        looks.append(list(analysed))
        events[len(looks) - 1]()

    monkeypatch.setattr(sys.modules["esdtool.cli.watch"].time, "sleep", pause)
    watch(run, "--every", 0.1, "--html", tmp_path / "live.html")
    # A damaged file is read as far as its header, and no further.
    assert looks == [[], ["step_1"], ["step_1"], ["step_1"], ["step_1"], ["step_1"]]
    assert analysed == ["step_1", "step_2", "step_5"]
    err = capsys.readouterr().err
    assert "waiting for the first checkpoint" in err
    assert err.count("left out until it changes") == 1


def test_a_checkpoint_that_goes_while_it_is_read_is_no_error(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from esdtool.comparison import landed

    save(tmp_path / "run" / "step_1")
    gone = save(tmp_path / "run" / "step_2")
    seen = landings(str(tmp_path / "run"))
    shutil.rmtree(gone)
    monkeypatch.setattr(landed, "landings", lambda source: seen)
    watch(tmp_path / "run", "--once", "--quiet")
    assert points(tmp_path / "run") == ["step_1"]


def test_two_watchers_share_the_work(save: Save, tmp_path: Path, analysed: list[str]) -> None:
    run = tmp_path / "run"
    for step in range(3):
        save(run / f"step_{step}", seed=step)
    errors: list[BaseException] = []

    def one() -> None:
        try:
            watch(run, "--once", "--quiet", "--jobs", 1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(analysed) == ["step_0", "step_1", "step_2"]
    assert points(run) == ["step_0", "step_1", "step_2"]


def test_a_torn_line_of_the_journal_is_passed_over(save: Save, tmp_path: Path, own_cache: Path) -> None:
    run = tmp_path / "run"
    save(run / "step_1")
    watch(run, "--once", "--quiet")
    (journal,) = (own_cache / "watch").glob("*.jsonl")
    with journal.open("a") as stream:
        stream.write('{"path": "x", "sig')
    save(run / "step_2", seed=1)
    watch(run, "--once", "--quiet")
    assert points(run) == ["step_1", "step_2"]
    assert [json.loads(line)["path"] for line in journal.read_text().splitlines() if line.endswith("}")] == [
        str(run / "step_1"),
        str(run / "step_2"),
    ]


def test_it_fails_on_findings(save: Save, tmp_path: Path) -> None:
    folder = save(tmp_path / "run" / "step_1")
    broken = {"model.layers.0.mlp.up_proj.weight": torch.full((64, 64), float("nan"))}
    broken["model.layers.0.mlp.down_proj.weight"] = torch.randn(64, 64)
    save_file(broken, folder / "model.safetensors")
    with pytest.raises(FindingsError):
        watch(tmp_path / "run", "--once", "--quiet", "--fail-on", "error")


def test_what_is_no_run_is_refused(save: Save, tmp_path: Path) -> None:
    with pytest.raises(NothingToAnalyzeError, match="no whole checkpoint"):
        watch(tmp_path / "missing", "--once")
    folder = save(tmp_path / "model")
    (folder / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="is one checkpoint"):
        watch(folder, "--once")
    with pytest.raises(UsageError, match="--html"):
        watch(folder, "--once", "--html", "-")


def test_patterns_and_files_are_found_in_the_order_of_training(make_llama: Any, tmp_path: Path) -> None:
    for name in ("ckpt_30.safetensors", "ckpt_4.safetensors", "notes_5.txt", "optimizer_6.safetensors"):
        save_file(make_llama(layers=1), tmp_path / name)
    expected = ["ckpt_4.safetensors", "ckpt_30.safetensors"]
    assert [Path(found.path).name for found in landings(str(tmp_path))] == expected
    assert [Path(found.path).name for found in landings(str(tmp_path / "ckpt_*"))] == expected


def test_a_run_folder_stands_for_its_last_checkpoint(
    save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for seed, step in enumerate((10, 9)):
        save(run / "checkpoints" / f"step_{step:06d}", seed=seed)
    for name in ("config.toml", "metrics.jsonl"):
        (run / name).touch()
    for name in ("checkpoints/step_000010", "final"):
        expected = run / name
        if not expected.exists():
            save(expected, seed=2)
        app(["analyze", str(run), "--json", str(tmp_path / "a.json")], standalone_mode=False)
        assert f"is a training run: taking its checkpoint {expected}" in capsys.readouterr().err
        assert json.loads((tmp_path / "a.json").read_text())["source"]["checkpoint"] == str(expected)
        other = str(run / "checkpoints" / "step_000009")
        app(["compare", other, str(run), "--json", str(tmp_path / "c.json")], standalone_mode=False)
        assert f"taking its checkpoint {expected}" in capsys.readouterr().err
        compared = json.loads((tmp_path / "c.json").read_text())["checkpoints"]
        assert [each["checkpoint"] for each in compared] == [other, str(expected)]
        app(["assign", str(run), "--out", str(tmp_path / "wd.json")], standalone_mode=False)
        assert f"taking its checkpoint {expected}" in capsys.readouterr().err
