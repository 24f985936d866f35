"""`esdtool train` on a bad day: a full disk, and a kill at any moment."""

from __future__ import annotations

import random
import resource
import shutil
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


def command(config: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "esdtool", "train", str(config), "--quiet", *words]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_no_half_checkpoint(
    write_config: Callable[..., Path], logs: Logs, tmp_path: Path
) -> None:
    """Files may grow to so many kilobytes only: the logs, the tokenizer, the weights and the optimizer fail in turn."""
    subprocess.run(command(write_config("whole")), check=True, timeout=200)
    shutil.copytree(tmp_path / "whole", tmp_path / "full")
    shutil.rmtree(tmp_path / "full/final")
    for later in (tmp_path / "full/checkpoints").glob("step_00001*"):
        shutil.rmtree(later)
    config = write_config("full")
    checkpoint = tmp_path / "full/checkpoints/step_000005"
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    for kilobytes in (5, 10, 100, 600):
        limit = kilobytes * 1024
        full = subprocess.run(
            command(config, "--resume", "auto"),
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert full.returncode == 1, full.stderr
        assert full.stderr.count("\n") == 1, full.stderr
        assert full.stderr.startswith("esdtool: error: ")
        assert str(tmp_path / "full") in full.stderr
        assert [path.name for path in (tmp_path / "full/checkpoints").iterdir()] == ["step_000005"]
        assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    subprocess.run(command(config, "--resume", "auto"), check=True, timeout=200)
    assert logs(tmp_path / "full") == logs(tmp_path / "whole")


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(write_config: Callable[..., Path], logs: Logs, tmp_path: Path) -> None:
    sections = {
        "schedule": {"steps": 30},
        "checkpoint": {"every": 3, "keep": 2},
        "eval": {"every": 2, "tokens": 200},
        "logging": {"every": 1},
    }
    whole, killed = (write_config(name, **sections) for name in ("whole", "killed"))
    subprocess.run(command(whole), check=True, timeout=200)
    source = random.Random(0)
    metrics = tmp_path / "killed/metrics.jsonl"
    for _ in range(4):
        begun = metrics.stat().st_size if metrics.exists() else 0
        process = subprocess.Popen(command(killed, "--resume", "auto"), stderr=subprocess.PIPE, text=True)
        # From when it is at work: imports take most of the time, and write nothing.
        while process.poll() is None and (metrics.stat().st_size if metrics.exists() else 0) == begun:
            time.sleep(0.005)
        time.sleep(source.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        assert "Traceback" not in process.communicate(timeout=60)[1]
    subprocess.run(command(killed, "--resume", "auto"), check=True, timeout=200)
    assert logs(tmp_path / "killed") == logs(tmp_path / "whole")
    weights = [(tmp_path / name / "final/model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in (tmp_path / "killed/checkpoints").iterdir()) == ["step_000027", "step_000030"]
