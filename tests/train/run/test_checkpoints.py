"""Resuming: bit for bit what an uninterrupted run does, whatever happened; and checkpoints that do not fit."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esdtool.errors import CheckpointError, ConfigError, OutputError
from esdtool.train import loop
from esdtool.train.loop import train
from esdtool.train.run.manifest import find_checkpoint, list_checkpoints, read_manifest

Config = Callable[..., Any]
Logs = Callable[[Path], tuple[list[dict[str, Any]], list[dict[str, Any]]]]


def stop_at(update: int, monkeypatch: pytest.MonkeyPatch, how: Callable[[], None]) -> None:
    """Do something in the forward pass of an update of this process, counted from 1 (two micro-batches each)."""
    calls = 0
    original = loop.summed_loss

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2 * update - 1:
            how()
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "summed_loss", watched)


class PowerCut(BaseException):
    """The process ends here, without any clearing up of ours."""


def cut() -> None:
    raise PowerCut


def same_weights(first: Path, second: Path) -> bool:
    return (first / "final/model.safetensors").read_bytes() == (second / "final/model.safetensors").read_bytes()


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "alphadecay": {},
    "adam": {"optimizer": {"name": "adam"}},
    "muon": {"optimizer": {"name": "muon", "max_grad_norm": 0.5}},
    "bf16": {"precision": {"name": "bf16"}},
    "awd": {"weight_decay": {"policy": "awd"}},
    "adadecay": {"weight_decay": {"policy": "adadecay"}},
    "adadecay-parameter": {"weight_decay": {"policy": "adadecay", "adadecay_rule": "parameter"}},
    "uniform": {"weight_decay": {"policy": "uniform", "unlisted": "no-decay"}, "eval": {"average": 0.75}},
    "late": {"weight_decay": {"interval": 5, "delay": 3}},  # the checkpoint of step 5 holds a refresh under way
    "document": {"data": {"packing": "document"}, "schedule": {"name": "wsd"}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(
    case: str, make_config: Config, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(make_config("whole", **CASES[case]), quiet=True)
    config = make_config("broken", **CASES[case])
    with monkeypatch.context() as patch:
        stop_at(9, patch, cut)  # the last checkpoint is of step 5, lines of steps 6 and 8 are on the disk
        with pytest.raises(PowerCut):
            train(config, quiet=True)
    assert [path.name for path in list_checkpoints(whole.run)] == ["step_000005", "step_000010", "step_000012"]
    resumed = train(config, resume="auto", quiet=True)
    assert logs(resumed.run) == logs(whole.run)
    assert same_weights(resumed.run, whole.run)


def test_dropout_is_resumed_too(
    make_config: Config, logs: Logs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpt2 = {
        "model_type": "gpt2",
        "vocab_size": 300,
        "n_embd": 64,
        "n_head": 2,
        "n_layer": 1,
        "n_positions": 64,
        "resid_pdrop": 0.2,
        "embd_pdrop": 0.2,
    }
    path = tmp_path / "gpt2.json"
    path.write_text(json.dumps(gpt2))
    model = {"config": str(path)}
    whole = train(make_config("whole", model=model), quiet=True)
    config = make_config("broken", model=model)
    with monkeypatch.context() as patch:
        stop_at(8, patch, cut)
        with pytest.raises(PowerCut):
            train(config, quiet=True)
    assert logs(train(config, resume="auto", quiet=True).run) == logs(whole.run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(
    number: signal.Signals, make_config: Config, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(make_config("whole"), quiet=True)
    config = make_config("stopped")
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(7, patch, lambda: os.kill(os.getpid(), number))
        result = train(config, quiet=True)
    assert signal.getsignal(number) is before
    assert (result.stopped_by, result.step, result.evaluation) == (number, 7, None)
    assert result.checkpoint is not None
    assert result.checkpoint.name == "step_000007"
    assert not (result.run / "final").exists()
    resumed = train(config, resume="auto", quiet=True)
    assert logs(resumed.run) == logs(whole.run)
    assert same_weights(resumed.run, whole.run)


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("after", ["at once", "killed", "stopped again"])
def test_a_signal_on_an_evaluation_step_loses_no_evaluation(
    at: int, after: str, make_config: Config, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"eval": {"every": 2, "tokens": 300}, "schedule": {"steps": 6}, "checkpoint": {"every": 4}}
    whole = train(make_config("whole", **sections), quiet=True)
    config = make_config("stopped", **sections)
    with monkeypatch.context() as patch:
        stop_at(at, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(config, quiet=True).step == at
    if after != "at once":  # the process that resumes ends right after it has made up for the evaluation
        with monkeypatch.context() as patch:
            how = cut if after == "killed" else lambda: os.kill(os.getpid(), signal.SIGTERM)
            stop_at(1, patch, how)
            with contextlib.suppress(PowerCut):
                train(config, resume="auto", quiet=True)
    resumed = train(config, resume="auto", quiet=True)
    assert logs(resumed.run) == logs(whole.run)
    metrics, _ = logs(resumed.run)
    assert [line["step"] for line in metrics if line["split"] == "validation"] == [2, 4, 6]
    assert same_weights(resumed.run, whole.run)


def test_a_second_signal_acts_at_once(make_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    stop_at(3, monkeypatch, twice)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(), quiet=True)


def test_only_the_last_checkpoints_are_kept(make_config: Config) -> None:
    run = train(make_config(checkpoint={"every": 2, "keep": 3}), quiet=True).run
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_000008",
        "step_000010",
        "step_000012",
    ]


def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoint(
    make_config: Config, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(make_config("whole"), quiet=True)
    config = make_config("full")
    original = torch.save
    calls = 0

    def full(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OutputError, match=r"step_000010: .*No space left on device; the last .* is .*step_000005"):
            train(config, quiet=True)
    assert [path.name for path in (config_run(config) / "checkpoints").iterdir()] == ["step_000005"]
    assert logs(train(config, resume="auto", quiet=True).run) == logs(whole.run)


def config_run(config: Any) -> Path:
    return Path(config.run_dir)


def test_auto_passes_over_what_is_not_whole(
    make_config: Config, logs: Logs, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    run = train(config, quiet=True).run
    expected = logs(run)
    weights = run / "checkpoints/step_000012/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (run / "checkpoints/step_000010/esdtool_checkpoint.json").unlink()
    saved, remarks = find_checkpoint(run, "auto")
    assert saved is not None
    assert saved.step == 5
    assert len(remarks) == 2
    assert "model.safetensors: truncated" in remarks[0]
    train(config, resume="auto")
    assert logs(run) == expected
    assert "passed over" in capsys.readouterr().err


def test_auto_without_a_checkpoint_begins_anew(
    make_config: Config, logs: Logs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    with monkeypatch.context() as patch:
        stop_at(4, patch, cut)
        with pytest.raises(PowerCut):
            train(config, quiet=True)
    resumed = train(config, resume="auto")
    assert "starting from the beginning" in capsys.readouterr().err
    assert logs(resumed.run) == logs(train(make_config("whole"), quiet=True).run)


def test_an_older_checkpoint_by_path_drops_the_later_ones(make_config: Config, logs: Logs) -> None:
    config = make_config()
    run = train(config, quiet=True).run
    expected = logs(run)
    train(config, resume=str(run / "checkpoints/step_000005"), quiet=True)
    assert logs(run) == expected
    assert [path.name for path in list_checkpoints(run)] == ["step_000005", "step_000010", "step_000012"]


def test_a_checkpoint_of_one_run_begins_another(make_config: Config, logs: Logs) -> None:
    first = train(make_config("first"), quiet=True).run
    other = train(make_config("other"), quiet=True).run
    start = str(first / "checkpoints/step_000005")
    with pytest.raises(ConfigError, match="already holds a run"):
        train(make_config("other"), resume=start, quiet=True)
    assert [path.name for path in list_checkpoints(other)] == ["step_000005", "step_000010", "step_000012"]
    branch = train(make_config("branch"), resume=start, quiet=True).run
    assert logs(branch)[0] == [line for line in logs(first)[0] if line["step"] > 5]


def test_resuming_a_finished_run_changes_nothing(make_config: Config, logs: Logs) -> None:
    config = make_config()
    first = train(config, quiet=True)
    expected = logs(first.run)
    again = train(config, resume="auto", quiet=True)
    assert logs(first.run) == expected
    assert again.evaluation is not None
    assert first.evaluation is not None
    assert again.evaluation.loss == pytest.approx(first.evaluation.loss, abs=1e-6)


def test_a_longer_schedule_goes_on(make_config: Config, logs: Logs, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_config(), quiet=True)
    result = train(make_config(schedule={"steps": 14}), resume="auto")
    assert "schedule.steps (12 then, 14 now)" in capsys.readouterr().err
    assert result.step == 14


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"optimizer": {"name": "adam"}}, ConfigError, r"optimizer\.name \(adamw then, adam now\)"),
        ({"weight_decay": {"policy": "none"}}, ConfigError, r"weight_decay\.policy \(alphadecay then, none now\)"),
        ({"batch": {"global_size": 8}}, ConfigError, r"cannot resume: batch\.global_size differs"),
        ({"run": {"seed": 3}}, ConfigError, r"cannot resume: run\.seed differs"),
        ({"model": {"preset": "llama-1m"}}, CheckpointError, "a checkpoint of another model: tensor "),
    ],
)
def test_another_run_is_refused(
    change: dict[str, Any], error: type[Exception], message: str, make_config: Config
) -> None:
    run = train(make_config(), quiet=True).run
    changed = make_config(**change)
    with pytest.raises(error, match=message) as caught:
        train(changed, resume="auto", quiet=True)
    assert "\n" not in str(caught.value)
    assert [path.name for path in list_checkpoints(run)][-1] == "step_000012"


def test_damaged_checkpoints_by_path_are_one_line(make_config: Config, tmp_path: Path) -> None:
    config = make_config()
    run = train(config, quiet=True).run
    good = run / "checkpoints/step_000010"

    def damaged(name: str, damage: Callable[[Path], object]) -> str:
        copy = run / name
        shutil.copytree(good, copy)
        damage(copy)
        with pytest.raises(CheckpointError) as caught:
            train(config, resume=str(copy), quiet=True)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "truncated: 10 bytes" in damaged("a", lambda path: (path / "model.safetensors").write_bytes(b"0123456789"))
    assert "trainer_state.pt: missing" in damaged("b", lambda path: (path / "trainer_state.pt").unlink())
    assert "cannot read" in damaged("c", lambda path: (path / "esdtool_checkpoint.json").write_text("{"))
    assert "another format" in damaged(
        "d", lambda path: (path / "esdtool_checkpoint.json").write_text('{"format": "x", "version": 1}')
    )

    def scramble(path: Path) -> None:
        state = path / "trainer_state.pt"
        state.write_bytes(bytes(255 - byte for byte in state.read_bytes()))

    assert "cannot read the trainer state" in damaged("e", scramble)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        train(config, resume=str(tmp_path / "nowhere"), quiet=True)
    with pytest.raises(CheckpointError, match=r"set model\.from"):
        train(config, resume=str(run / "final"), quiet=True)


def test_a_manifest_tells_what_is_there(make_config: Config) -> None:
    run = train(make_config(), quiet=True).run
    saved = read_manifest(run / "checkpoints/step_000010")
    assert saved.step == 10
    assert saved.config["optimizer"]["lr"] == 3e-3
    manifest = json.loads((saved.path / "esdtool_checkpoint.json").read_text())
    files = {path.name for path in saved.path.iterdir()}
    assert files == set(manifest["files"]) | {"esdtool_checkpoint.json"}
    assert {"model.safetensors", "config.json", "tokenizer.json", "trainer_state.pt"} <= files
