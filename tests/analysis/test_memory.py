"""What is in memory at a time: predicted with the base and the difference, and named where it does not suffice."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import esdtool
from esdtool.analysis import run as run_module
from esdtool.analysis.plan import make_plan
from esdtool.checkpoint import Checkpoint, from_state_dict
from esdtool.errors import EsdtoolError, LackOfMemoryError
from esdtool.spectra.options import ScoreOptions
from esdtool.support.memory import is_lack_of_memory


def weights(dtype: torch.dtype = torch.float32, size: int = 600) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{index}.mlp.up_proj.weight": torch.randn(size, size // 2, generator=generator).to(dtype)
        for index in range(3)
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_base_and_the_difference_are_counted(dtype: torch.dtype) -> None:
    # Long and thin: what is read is more than what is computed with.
    tensors = {"layers.0.mlp.up_proj.weight": torch.randn(40_000, 64).to(dtype)}
    base = {"layers.0.mlp.up_proj.weight": torch.randn(40_000, 64).to(dtype)}
    alone = make_plan(tensors, ScoreOptions(), jobs=1)
    paired = make_plan(tensors, ScoreOptions(), base=base, jobs=1)
    stored = tensors["layers.0.mlp.up_proj.weight"].nbytes
    difference = 40_000 * 64 * (8 if dtype == torch.float64 else 4)
    assert paired.peak_bytes >= 2 * stored + difference
    assert paired.peak_bytes > alone.peak_bytes


MEASURE = """
import resource, torch
from esdtool.analysis.difference import difference
from esdtool.analysis.plan import make_plan
from esdtool.spectra.options import ScoreOptions

name, shape = "layers.0.mlp.up_proj.weight", (1_000_000, 64)
sides = [{name: torch.ones(shape, dtype=torch.DTYPE) * value} for value in (1.0, 1.5)]
plan = make_plan(sides[0], ScoreOptions(), base=sides[1], jobs=1)
(module,) = plan.selection.modules
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
difference(plan.checkpoint, module, plan.base.checkpoint, plan.base.pairing.base[module.name])
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
stored = 2 * sides[0][name].nbytes  # which was there before
print(grown, plan.limits.need((module,)) - stored)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has another unit elsewhere")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_prediction_bounds_what_a_difference_takes(dtype: str) -> None:
    code = MEASURE.replace("torch.DTYPE", f"torch.{dtype}")
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    grown, predicted = map(int, text.split())
    assert 0.2 * predicted < grown <= 1.02 * predicted


def sharded(tensors: dict[str, torch.Tensor], log: list[tuple[str, str]]) -> Checkpoint:
    inner = from_state_dict(tensors)
    values: dict[str, Any] = dict(vars(inner)) | {"collective_reads": True}
    copy = type(inner)(**values)
    read = type(inner).read

    def logged(self: Any, name: str, *arguments: Any, **options: Any) -> Any:
        log.append((name, threading.current_thread().name))
        return read(self, name, *arguments, **options)

    copy.__class__ = type("Logged", (type(inner),), {"read": logged})
    return copy


@pytest.mark.parametrize("side", ["checkpoint", "base"])
def test_collective_reads_of_either_side_are_made_by_one_thread_in_one_order(side: str) -> None:
    orders = []
    for _ in range(2):
        log: list[tuple[str, str]] = []
        plain, collective = weights(), sharded(weights(), log)
        if side == "base":
            esdtool.analyze(plain, base=collective, jobs=3)
        else:
            esdtool.analyze(collective, base=plain, jobs=3)
        assert len({thread for _, thread in log}) == 1
        orders.append([name for name, _ in log])
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == sorted(weights())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 12 GiB for an array"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        OSError(12, "Cannot allocate memory"),
    ],
)
@pytest.mark.parametrize("place", ["read_matrices", "score_batch"])
def test_too_little_memory_names_the_tensor_and_the_options(
    error: Exception, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run_module, place, fail)
    with pytest.raises(LackOfMemoryError) as raised:
        esdtool.analyze(weights())
    message = str(raised.value)
    assert "layers." in message
    assert "up_proj" in message
    assert "600x300" in message
    assert "--memory" in message
    assert "--jobs" in message


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(run_module, "score_batch", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        esdtool.analyze(weights())
    assert not is_lack_of_memory(EsdtoolError("model.safetensors: truncated"))


def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from esdtool.__main__ import main

    def fail() -> None:
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esdtool.cli.app", lambda **_: fail())
        with pytest.raises(SystemExit) as left:
            main()
    assert left.value.code == 1
    assert capsys.readouterr().err == "esdtool: error: not enough memory\n"
