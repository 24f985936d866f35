"""`esdtool train`, `eval` and `compare` as a user types them: streams, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]
Logs = Callable[[Path], tuple[list[dict[str, Any]], list[dict[str, Any]]]]


def one_line(result: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The error of a failed command, which is all that it said."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("esdtool: error: ")
    return result.stderr


def test_a_run_from_end_to_end(esdtool_cli: Cli, write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config()
    result = esdtool_cli("train", config)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].startswith("step 0/12  decays 0.067 to 0.5 from alphas ")
    assert "perplexity" in lines[-1]
    final = tmp_path / "run/final"

    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][-1]
    evaluated = esdtool_cli("eval", final, "--config", tmp_path / "run/config.toml", "--json", "-")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["loss"] == pytest.approx(logged["loss"], abs=1e-6)

    assert esdtool_cli("analyze", final, "-q", "--json", tmp_path / "a.json").returncode == 0
    assigned = esdtool_cli("assign", tmp_path / "a.json", "--out", tmp_path / "wd.json")
    assert assigned.returncode == 0, assigned.stderr

    overrides = ["--set", f"run.dir={tmp_path / 'static'}", "--set", "weight_decay.policy=file"]
    static = esdtool_cli("train", config, *overrides, "--set", f"weight_decay.path={tmp_path / 'wd.json'}", "-q")
    assert (static.returncode, static.stderr) == (0, "")

    compared = esdtool_cli(
        "compare", tmp_path / "run", tmp_path / "static", "--csv", "-", "--plots", tmp_path / "plots"
    )
    assert compared.returncode == 0, compared.stderr
    assert len(compared.stdout.splitlines()) == 3
    assert (tmp_path / "plots/loss.png").is_file()
    shown = esdtool_cli("compare", tmp_path / "run", tmp_path / "static")
    assert "Validation perplexity by run" in shown.stdout
    assert shown.stderr == ""


def test_print_config_is_the_whole_config_and_nothing_else(esdtool_cli: Cli, write_config: Callable[..., Path]) -> None:
    import tomllib

    result = esdtool_cli("train", write_config(), "--print-config", "--set", "optimizer.lr=5e-4")
    assert (result.returncode, result.stderr) == (0, "")
    document = tomllib.loads(result.stdout)
    assert document["optimizer"]["lr"] == 5e-4
    assert document["weight_decay"]["max_ratio"] == 5.0


def test_dry_run_prints_sizes_and_writes_nothing(
    esdtool_cli: Cli, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    result = esdtool_cli("train", write_config(), "--dry-run")
    assert (result.returncode, result.stderr) == (0, "")
    rows = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert rows["tokens"].strip() == "1,536 (128 a step)"
    assert rows["parameters"].strip().startswith("108,")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["llama-60m-adamw", pytest.param("llama-1b-adam", marks=pytest.mark.slow)])
def test_dry_run_of_the_papers_settings_needs_no_network(esdtool_cli: Cli, name: str) -> None:
    folder = Path(__file__).parents[2] / "examples/configs"
    overlay = folder / "policies/uniform.toml"
    result = esdtool_cli("train", folder / f"{name}.toml", overlay, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "(131,072 a step)" in result.stdout
    assert "uniform" in result.stdout


def test_kill_9_in_mid_run_and_resume(write_config: Callable[..., Path], logs: Logs, tmp_path: Path) -> None:
    whole, killed = (
        write_config(name, schedule={"steps": 60}, checkpoint={"every": 7, "keep": 2}) for name in ("whole", "killed")
    )
    start(whole).wait(timeout=200)
    process = start(killed)
    wait_for(tmp_path / "killed/checkpoints/step_000021", process)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (tmp_path / "killed/final").exists()
    assert start(killed, "--resume", "auto").wait(timeout=200) == 0
    assert logs(tmp_path / "killed") == logs(tmp_path / "whole")
    weights = [(tmp_path / name / "final/model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_so(
    number: signal.Signals, code: int, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    process = start(write_config(schedule={"steps": 2000}, checkpoint={"every": 1000}), "-q", stderr=subprocess.PIPE)
    wait_for(tmp_path / "run/metrics.jsonl", process, '"step": 4')
    process.send_signal(number)
    _, error = process.communicate(timeout=100)
    assert process.returncode == code
    assert error.count("\n") == 1
    assert f"{number.name}: stopped after step" in error
    assert "--resume auto" in error
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert str(saved) in error


def start(config: Path, *arguments: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "esdtool", "train", str(config), *arguments], stderr=stderr, text=True, env=os.environ
    )


def wait_for(path: Path, process: subprocess.Popen[str], text: str = "") -> None:
    """Until the path is there and holds the text."""
    while process.poll() is None:
        if path.exists() and (not text or text in path.read_text()):
            return
        time.sleep(0.01)
    raise AssertionError(f"the run ended before {path} was there")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.files=nowhere/*.txt"], "nowhere/*.txt"),
        (["batch.global_size=4000", "batch.micro_size=4000"], "shorter than one batch"),
        (["optimizer.lrr=1"], "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        (["logging.wandb=true"], "logging.wandb = true needs an optional extra"),
        (["batch.sequence_length=256"], "batch.sequence_length 256 is more than the 128 positions"),
        (["run.device=cuda"], "run.device"),
        pytest.param(
            ["weight_decay.include=nothing"], "weight_decay.include 'nothing' matches no module", marks=pytest.mark.slow
        ),
    ],
    ids=["glob", "short", "key", "wandb", "positions", "cuda", "include"],
)
def test_errors_are_one_line(
    overrides: list[str], message: str, esdtool_cli: Cli, write_config: Callable[..., Path]
) -> None:
    import torch

    if "run.device=cuda" in overrides and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    options = [option for override in overrides for option in ("--set", override)]
    assert message in one_line(esdtool_cli("train", write_config(), *options))


def test_more_errors_are_one_line(esdtool_cli: Cli, write_config: Callable[..., Path], tmp_path: Path) -> None:
    assert "nowhere.toml" in one_line(esdtool_cli("train", tmp_path / "nowhere.toml"))
    config = write_config()
    assert "no such checkpoint" in one_line(esdtool_cli("train", config, "--resume", tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    in_file = esdtool_cli("train", config, "--set", f"run.dir={tmp_path / 'file' / 'run'}")
    assert "cannot make the run directory" in one_line(in_file)
    assert "exactly one of --data" in one_line(esdtool_cli("eval", tmp_path), 2)
    assert "matches no file" in one_line(esdtool_cli("eval", tmp_path, "--data", tmp_path / "none-*.txt"))
    assert "no run directory" in one_line(esdtool_cli("compare", tmp_path))


def test_eval_measures_any_text(esdtool_cli: Cli, bundled: Path, text: str) -> None:
    result = esdtool_cli("eval", bundled, "--data", text, "--tokens", 2000, "--sequence-length", 64)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("loss ")
    assert "targets)" in result.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.device=cuda"], "run.device"),
        (["logging.wandb=true"], "logging.wandb = true needs an optional extra"),
        (["weight_decay.include=nothing"], "weight_decay.include 'nothing' matches no module"),
        pytest.param(["weight_decay.exclude=."], "the model has no weight module to assign", marks=pytest.mark.slow),
        (["run.distributed=fsdp2"], 'run.distributed = "fsdp2" needs ranks'),
        (["weight_decay.policy=file", "weight_decay.path={other}"], "lm_head"),
        pytest.param(
            ["weight_decay.policy=file", "weight_decay.path=nowhere.json"], "nowhere.json", marks=pytest.mark.slow
        ),
        (["run.dir={used}"], "already holds a run"),
    ],
    ids=["cuda", "wandb", "include", "exclude", "fsdp2", "other", "nowhere", "used"],
)
def test_a_dry_run_refuses_what_the_run_refuses(
    overrides: list[str], message: str, esdtool_cli: Cli, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    import torch

    if "run.device=cuda" in overrides and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    entry = {"weight_decay": 0.1, "shape": [300, 65]}
    document = {"format": "esdtool.weight_decay", "version": 1, "optimizer": "decoupled", "base_weight_decay": 0.1}
    (tmp_path / "other.json").write_text(
        json.dumps(document | {"unlisted": "keep", "parameters": {"lm_head.weight": entry}})
    )
    (tmp_path / "used").mkdir()
    (tmp_path / "used/metrics.jsonl").write_text("")
    places = {"other": tmp_path / "other.json", "used": tmp_path / "used"}
    options = [word for override in overrides for word in ("--set", override.format(**places))]
    config = write_config()
    dry = one_line(esdtool_cli("train", config, "--dry-run", *options))
    assert message in dry
    assert one_line(esdtool_cli("train", config, "-q", *options)) == dry
    assert not (tmp_path / "run").exists()
