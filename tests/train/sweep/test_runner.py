"""`esdtool sweep` as a user types it: every run once, whatever stops it in between."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from esdtool.cli.compare_sources import sort_out
from esdtool.comparison.runs import compare_runs, load_run
from esdtool.report.terminal.runs import print_settings
from esdtool.train.config.loading import load_config
from esdtool.train.loop import train
from esdtool.train.sweep.plan import plan_sweep
from esdtool.train.sweep.runner import run_sweep, state_of

Cli = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[..., Path]


def write_sweep(path: Path, base: Path, grid: str, head: str = "") -> Path:
    path.write_text(f'[sweep]\nconfig = "{base}"\ndir = "{path.parent / "out"}"\n{head}\n{grid}', encoding="utf-8")
    return path


TWO = '[[grid]]\nweight_decay.policy = ["uniform", "none"]\n'


def validations(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["split"] == "validation"]


def test_from_the_file_to_the_table(
    esdtool_cli: Cli, write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_config("base")
    sweep = write_sweep(tmp_path / "s.toml", base, TWO, "seeds = [0, 1]\njobs = 2")
    out = tmp_path / "out"
    assert {state_of(run) for run in plan_sweep(sweep).runs} == {"new"}
    assert not out.exists()

    result = esdtool_cli("sweep", sweep)
    assert result.returncode == 0, result.stderr
    assert "4 runs" in result.stderr
    assert "uniform, seed 0: begun, its messages go to" in result.stderr
    assert "[4/4]" in result.stderr
    table = result.stdout.splitlines()
    assert table[0] == "Validation perplexity at the end: mean ± standard error over seeds"
    assert any(line.split()[0:2] == ["none", "uniform"] for line in table if line.strip()), result.stdout
    runs = sorted(out.glob("*/seed-*/"))
    assert len(runs) == 4
    assert all(validations(run) == [4, 8, 12] for run in runs)
    # The seed alone makes the difference between two runs of one setting.
    weights = {(run / "final/model.safetensors").read_bytes() for run in runs}
    assert len(weights) == 4
    train(load_config(out / "none/seed-1.toml", [f"run.dir={tmp_path / 'alone'}"]), quiet=True)
    assert (tmp_path / "alone/final/model.safetensors").read_bytes() in weights

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = run_sweep(plan_sweep(sweep))
    assert (len(again.finished), again.failed, again.elsewhere) == (4, (), ())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    listed = esdtool_cli("sweep", sweep, "--dry-run", "--set", "logging.every=3")  # which changes no number
    assert listed.stdout.splitlines() == [
        f"finished  {out}/{policy}/seed-{seed}" for seed in (0, 1) for policy in ("uniform", "none")
    ]
    print_settings(compare_runs([load_run(run) for run in sort_out([str(out)]).runs]))
    assert capsys.readouterr().out == result.stdout

    write_sweep(sweep, base, TWO.replace('"none"', '"none", "awd"'), "seeds = [0, 1]")
    changed = esdtool_cli("sweep", sweep, "--set", "optimizer.lr=1e-4", "-q")
    assert changed.returncode == 1
    assert "seed-0 holds a run with another optimizer.lr: remove it, or choose another dir" in changed.stderr
    assert not (out / "awd").exists()


@pytest.mark.slow
def test_one_run_stops_no_other(esdtool_cli: Cli, write_config: Write, tmp_path: Path) -> None:
    base = write_config("base", weight_decay={"policy": "uniform"})
    sweep = write_sweep(tmp_path / "s.toml", base, "[[grid]]\noptimizer.lr = [1e30, 0.5, 1e-3]")
    busy = tmp_path / "out/run-lr-0.5"
    busy.mkdir(parents=True)
    with (busy / "seed-0.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # as another sweep's run has it
        result = esdtool_cli("sweep", sweep)
    assert result.returncode == 1
    assert "run-lr-0.5, seed 0: another process is at work on it" in result.stderr
    assert not (busy / "seed-0").exists()
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"esdtool: error: 1 of 3 runs failed, the first {tmp_path}/out/run-lr-1e+30/seed-0: step ")
    assert "the loss is" in last
    assert "Traceback" not in result.stderr
    assert (tmp_path / "out/run-lr-0.001/seed-0/final").is_dir()
    assert "uniform" in result.stdout


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_stopped_in_the_middle_it_goes_on(write_config: Write, tmp_path: Path, number: signal.Signals) -> None:
    base = write_config("base", schedule={"steps": 150}, checkpoint={"every": 20, "keep": 2}, eval={"every": 150})
    sweep = write_sweep(tmp_path / "s.toml", base, '[[grid]]\nweight_decay.policy = "uniform"')
    folder = tmp_path / "out/uniform/seed-0"
    process = subprocess.Popen(
        [sys.executable, "-m", "esdtool", "sweep", str(sweep)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not list(folder.glob("checkpoints/step_*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate()
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert "stopped with 0 of 1 runs finished; the same command goes on" in said
    else:  # the run goes on alone, and a second sweep does not touch it
        assert len(run_sweep(plan_sweep(sweep)).elsewhere) == 1
        _kill_run(folder)
    assert not (folder / "final").exists()
    assert [state_of(run) for run in plan_sweep(sweep).runs] == ["begun"]
    assert len(run_sweep(plan_sweep(sweep)).finished) == 1

    train(load_config(base, ["weight_decay.policy=uniform", f"run.dir={tmp_path}/whole"]), quiet=True)
    weights = [(path / "final/model.safetensors").read_bytes() for path in (folder, tmp_path / "whole")]
    assert weights[0] == weights[1]


def _kill_run(folder: Path) -> None:
    """SIGKILL to the process that has the lock of this run."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if f"{folder}.toml" in command:
            os.kill(int(process.name), signal.SIGKILL)
            # Its threads end one by one, and the last of them lets go of the lock.
            with folder.with_suffix(".log").open("a") as log:
                fcntl.flock(log, fcntl.LOCK_EX)
            return
    raise AssertionError("the run is not there")
