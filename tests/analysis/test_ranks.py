"""Processes that share an analysis: who they are, and what becomes of the others when one is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from esdtool.errors import UsageError
from esdtool.support.launch import launched

needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs the gloo backend")

SECONDS = 60.0
"""Within which the others end."""

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": " 1 ", "RANK": "x"}]
)
def test_a_process_of_its_own(environment: dict[str, str]) -> None:
    assert launched(environment) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0'"),
        ({"WORLD_SIZE": "9" * 5000}, "not what a launcher sets"),
        ({"RANK": ""}, "WORLD_SIZE=2, but no RANK"),
        ({"RANK": "2"}, "RANK=2 does not fit WORLD_SIZE=2"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK='first'"),
        ({"MASTER_ADDR": ""}, "no MASTER_ADDR"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ],
)
def test_what_no_launcher_sets_is_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        launched(TORCHRUN | changes)


def test_what_torchrun_sets_is_read() -> None:
    found = launched(TORCHRUN | {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert found is not None
    assert (found.rank, found.size, found.local_rank, found.local_size) == (1, 2, 1, 1)
    assert (found.by_launcher, found.agent_store) == (True, True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({f"layers.{index}.mlp.up_proj.weight": torch.randn(64, 80) for index in range(4)}, path)
    return path


def start(checkpoint: object, *options: str, ranks: Mapping[int, str], size: int = 2) -> list[subprocess.Popen[str]]:
    """Start some ranks of an analysis, each with Python code that runs whenever it reads a module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (
        "import os, signal, sys, time\n"
        "import esdtool.analysis.run as run\n"
        "read = run.read_matrices\n"
        "def patched(checkpoint, module, **options):\n"
        "    {patch}\n"
        "    return read(checkpoint, module, **options)\n"
        "run.read_matrices = patched\n"
        "from esdtool.__main__ import main\n"
        "main()\n"
    )
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program.format(patch=patch), "analyze", str(checkpoint), "--no-cache", *options],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, patch in ranks.items()
    ]


def ends(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr."""
    try:
        _, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, errors


BUSY = "time.sleep(600)"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@needs_gloo
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_rank_that_dies_at_work_ends_the_others_at_once(checkpoint: Path, lost: int) -> None:
    processes = start(checkpoint, ranks={rank: KILLED if rank == lost else BUSY for rank in range(3)}, size=3)
    found = [ends(process) for process in processes]
    line = f"esdtool: error: rank {lost} ended before its work was done; start the analysis again\n"
    assert found[lost] == (-9, "")
    others = [found[rank] for rank in range(3) if rank != lost]
    assert [code for code, _ in others] == [1, 1]
    # The first rank tells for all; if it is lost itself, each must.
    assert [errors for _, errors in others] == ([line, line] if lost == 0 else [line, ""])


@needs_gloo
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_dies_when_the_others_wait_for_it(checkpoint: Path, lost: int) -> None:
    patch = f"time.sleep(3); {KILLED}"
    processes = start(checkpoint, ranks={rank: patch if rank == lost else "pass" for rank in range(2)})
    found = [ends(process) for process in processes]
    line = f"esdtool: error: rank {lost} ended before its work was done; start the analysis again\n"
    assert found[1 - lost] == (1, line)


@needs_gloo
def test_a_rank_that_never_comes_is_named(checkpoint: Path) -> None:
    (alone,) = start(checkpoint, ranks={0: "pass"})
    code, errors = ends(alone)
    assert code == 1
    assert errors == (
        "esdtool: error: rank 1 did not come: start all ranks with torchrun, or unset WORLD_SIZE to run in one "
        "process\n"
    )


def test_a_dry_run_waits_for_nobody(checkpoint: Path) -> None:
    began = time.monotonic()
    (alone,) = start(checkpoint, "--dry-run", ranks={0: "pass"})
    code, errors = ends(alone)
    assert (code, errors) == (0, "")
    assert time.monotonic() - began < SECONDS


@needs_gloo
@pytest.mark.parametrize(
    ("checkpoint_name", "options", "code", "words"),
    [
        ("missing.safetensors", (), 1, "missing.safetensors"),
        (None, ("--farms-ratio", "nan"), 2, "--farms-ratio"),
        (None, ("--include", "nowhere"), 2, "--include 'nowhere' matches no"),
        (None, ("--budget", "5"), 2, "--budget is for one process"),
        (None, ("--json", "no/such/folder/x.json"), 1, "does not exist"),
    ],
)
def test_an_error_of_all_ranks_is_reported_once(
    checkpoint: Path, checkpoint_name: str | None, options: tuple[str, ...], code: int, words: str
) -> None:
    processes = start(checkpoint_name or checkpoint, *options, ranks={0: "pass", 1: "pass"})
    (first, told), (second, untold) = map(ends, processes)
    assert (first, second, untold) == (code, code, "")
    (line,) = told.splitlines()
    assert words in line
