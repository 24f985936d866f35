"""Threads, reading ahead and the limit of memory; several processes for one analysis."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import esdtool
from esdtool.analysis import plan
from esdtool.analysis.execution import (
    Batch,
    Limits,
    MemoryGate,
    batches_of,
    carry_out,
    in_turn,
    peak_bytes,
    working_bytes,
)
from esdtool.analysis.plan import make_plan
from esdtool.analysis.ranks import AnalysisRanks
from esdtool.modules import WeightModule
from esdtool.spectra.options import ScoreOptions


def modules(*orders: int) -> list[Batch]:
    """Square ones, each by itself."""
    return [
        (
            WeightModule(
                name=f"m{i}", parameter=f"m{i}.weight", role="linear", layer=None, shape=(n, n), dtype="float32"
            ),
        )
        for i, n in enumerate(orders)
    ]


class Watch:
    """What was in memory and being computed at the same time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held: dict[str, int] = {}
        self.computing = 0
        self.most_bytes = self.most_computing = self.most_held = 0

    def read(self, batch: Batch) -> str:
        (module,) = batch
        with self.lock:
            self.held[module.name] = working_bytes(module)
            self.most_bytes = max(self.most_bytes, sum(self.held.values()))
            self.most_held = max(self.most_held, len(self.held))
        return module.name

    def compute(self, batch: Batch, name: str) -> str:
        assert name == batch[0].name
        with self.lock:
            self.computing += 1
            self.most_computing = max(self.most_computing, self.computing)
        time.sleep(0.01)
        with self.lock:
            self.computing -= 1
            del self.held[name]
        return name * 2


def test_all_is_done_once_on_so_many_slots_with_one_read_ahead() -> None:
    watch, work = Watch(), modules(*[64] * 20)
    found = list(carry_out(work, watch.read, watch.compute, limits=Limits(jobs=2)))
    assert sorted(result for _, result in found) == sorted(module.name * 2 for (module,) in work)
    assert all(result == module.name * 2 for (module,), result in found)
    assert watch.most_computing == 2
    assert watch.most_held == 3
    watch = Watch()
    list(carry_out(work, watch.read, watch.compute, limits=Limits(jobs=1, read_ahead=False)))
    assert watch.most_held == 1


@pytest.mark.parametrize("count", [0, 1, 8, 9, 21, 40])
def test_fetched_modules_come_large_and_small_in_turn(count: int) -> None:
    """Each once; the cheapest and the most expensive first, so that at every point the work is about half done."""
    work = modules(*range(200, 200 - count, -1))
    ordered = in_turn(work, jobs=2)
    assert sorted(ordered, key=work.index) == work
    if count <= 8:
        assert ordered == work
        return
    assert ordered[:2] == [work[-1], work[0]]
    done = 0.0
    for number, (module,) in enumerate(ordered, start=1):
        done += module.shape[0] - 200 + (count - 1) / 2  # the sizes without their mean
        assert abs(done) <= count, number


def test_memory_is_bounded_and_what_is_too_large_is_done_alone() -> None:
    work = modules(200, *[64] * 12)
    small, large = working_bytes(work[1][0]), working_bytes(work[0][0])
    watch = Watch()
    list(carry_out(work, watch.read, watch.compute, limits=Limits(jobs=4, memory=2 * small)))
    assert watch.most_bytes == large > 2 * small
    watch = Watch()
    list(carry_out(work[1:], watch.read, watch.compute, limits=Limits(jobs=4, memory=2 * small)))
    assert watch.most_bytes == 2 * small
    assert peak_bytes(work, Limits(jobs=4, memory=2 * small)) == large
    assert peak_bytes(work[1:], Limits(jobs=4, memory=2 * small)) == 2 * small
    assert peak_bytes(work[1:], Limits(jobs=2)) == 2 * small + 64 * 64 * 4


def test_a_failure_frees_what_it_held() -> None:
    gate = MemoryGate(10)
    with pytest.raises(ZeroDivisionError), gate.hold(10):
        _ = 1 / 0
    with gate.hold(10):
        pass

    def broken(batch: Batch, name: str) -> str:
        raise MemoryError(name)

    with pytest.raises(MemoryError):
        list(carry_out(modules(64, 64), Watch().read, broken, limits=Limits(jobs=1, memory=1)))


def test_the_result_does_not_depend_on_the_limit(llama_dir: Path) -> None:
    texts = {
        esdtool.analyze(llama_dir, jobs=jobs, memory=memory, cache=False).to_json()
        for jobs, memory in ((1, None), (3, None), (2, 1), (2, 10**9))
    }
    assert len(texts) == 1


def test_shares_are_balanced_and_complete(bundled: Path) -> None:
    every = make_plan(bundled, ScoreOptions()).selection.modules
    ranks = [AnalysisRanks(rank=rank, size=4, local_size=4) for rank in range(4)]
    shares = [rank.share(every) for rank in ranks]
    assert sorted(module.name for share in shares for module in share) == sorted(module.name for module in every)
    loads = [rank.cost(every) for rank in ranks]
    assert max(loads) < 1.2 * min(loads)


def run_ranks(*arguments: object, size: int = 2) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "esdtool", "analyze", *map(str, arguments)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs the gloo backend")
def test_two_processes_do_what_one_does(llama_dir: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("analysis.json", "esd.safetensors")}
    first, second = run_ranks(
        llama_dir, "--no-cache", "--json", files["analysis.json"], "--esd", files["esd.safetensors"]
    )
    assert (first[0], second) == (0, (0, "", ""))
    assert "Mean alpha" in first[1]
    alone = esdtool.analyze(llama_dir, cache=False)
    assert json.loads(files["analysis.json"].read_text()) == json.loads(alone.to_json())
    assert set(load_file(files["esd.safetensors"])) == set(alone.esds)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs the gloo backend")
def test_the_error_of_any_rank_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"layers.{index}.mlp.up_proj.weight": torch.randn(80 - index, 80) for index in range(2)}, path)
    (module,) = AnalysisRanks(rank=1, size=2, local_size=2).share(make_plan(path, ScoreOptions()).selection.modules)
    script = tmp_path / "sitecustomize.py"
    script.write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import esdtool.analysis.run\n"
        "    from esdtool.errors import CheckpointError\n"
        "    def broken(checkpoint, module, **more):\n"
        "        raise CheckpointError(f'{module.parameter}: unreadable')\n"
        "    esdtool.analysis.run.read_matrices = broken\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    first, second = run_ranks(path, "--no-cache")
    assert first == (1, "", f"esdtool: error: rank 1: {module.parameter}: unreadable\n")
    assert second == (1, "", "")


def test_small_neighbours_of_one_shape_go_together_on_an_accelerator() -> None:
    singles = modules(2000, 64, 64, 64, 100, 64)
    flat = [module for (module,) in singles]
    assert batches_of(flat, together=False, limits=Limits(jobs=1)) == singles
    together = batches_of(flat, together=True, limits=Limits(jobs=1))
    assert [[module.matrix_shape[0] for module in batch] for batch in together] == [[2000], [64] * 3, [100], [64]]
    two = 2 * working_bytes(flat[1])
    limited = batches_of(flat, together=True, limits=Limits(jobs=1, memory=two))
    assert [len(batch) for batch in limited] == [1, 2, 1, 1, 1]


def test_an_analysis_in_batches_is_the_same(monkeypatch: pytest.MonkeyPatch, llama_dir: Path) -> None:
    """On the CPU, by the code that an accelerator runs."""
    alone = esdtool.analyze(llama_dir, fit=("hill", "ks"), cache=False)
    sizes = []

    def batched(modules: Sequence[WeightModule], **options: Any) -> list[Batch]:
        found = batches_of(modules, together=True, limits=options["limits"])
        sizes.extend(map(len, found))
        return found

    monkeypatch.setattr(plan, "batches_of", batched)
    together = esdtool.analyze(llama_dir, fit=("hill", "ks"), cache=False)
    assert max(sizes) > 2
    assert [module.name for module in together.modules] == [module.name for module in alone.modules]
    for one, other in zip(alone.modules, together.modules, strict=True):
        assert (other.status, other.spectrum) == (one.status, one.spectrum)
        assert other.alpha == pytest.approx(one.alpha, rel=1e-9)
        assert other.lambda_max == pytest.approx(one.lambda_max, rel=1e-9)
