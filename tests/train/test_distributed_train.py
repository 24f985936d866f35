"""Two gloo processes do what one does: the same losses and decays, and the same data after a change of ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from esdtool.train.loop import train

Config = Callable[..., Any]
Logs = Callable[[Path], tuple[list[dict[str, Any]], list[dict[str, Any]]]]


def start_ranks(program: list[str], ranks: int) -> list[subprocess.Popen[str]]:
    """Run Python with these arguments on several ranks, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, *program],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def run_ranks(config: Path, *arguments: str, ranks: int = 2, check: bool = True) -> str:
    """Run the command on several ranks; returns what rank 0 wrote to stderr."""
    processes = start_ranks(["-m", "esdtool", "train", str(config), "--quiet", *arguments], ranks)
    errors = [process.communicate(timeout=200)[1] for process in processes]
    if check:
        assert [process.returncode for process in processes] == [0] * ranks, errors[0]
    return errors[0]


def assert_same(found: tuple[list[Any], list[Any]], expected: tuple[list[Any], list[Any]]) -> None:
    """Losses to float tolerance, decays to 1e-6, and the same lines."""
    assert [(line["step"], line["split"]) for line in found[0]] == [
        (line["step"], line["split"]) for line in expected[0]
    ]
    for key, tolerance in (("loss", 2e-5), ("weight_decay_mean", 1e-6)):
        assert [line[key] for line in found[0]] == pytest.approx([line[key] for line in expected[0]], abs=tolerance)
    assert [line["step"] for line in found[1]] == [line["step"] for line in expected[1]]
    for one, other in zip(found[1], expected[1], strict=True):
        assert one["modules"].keys() == other["modules"].keys()
        for name, module in one["modules"].items():
            assert module["weight_decay"] == pytest.approx(other["modules"][name]["weight_decay"], abs=1e-5)


@pytest.mark.parametrize("distributed", ["ddp", "fsdp2"])
def test_two_ranks_are_one(
    distributed: str, make_config: Config, write_config: Callable[..., Path], logs: Logs, tmp_path: Path
) -> None:
    # Rows of different lengths: a mean of means would show. One micro-batch of each rank against four.
    common = {
        "data": {"packing": "document"},
        "optimizer": {"max_grad_norm": 1.0},
        "batch": {"global_size": 8},
        "eval": {"average": 0.5},
    }
    one = train(make_config("one", **common), quiet=True).run
    run_ranks(write_config("two", **common, run={"distributed": distributed}))
    assert_same(logs(tmp_path / "two"), logs(one))
    weights = load_file(tmp_path / "two/final/model.safetensors")
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: tensor.shape for name, tensor in load_file(one / "final/model.safetensors").items()
    }


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param({"policy": "awd"}, marks=pytest.mark.slow),
        pytest.param({"policy": "adadecay"}, marks=pytest.mark.slow),
        {"policy": "adadecay", "adadecay_rule": "parameter"},
    ],
    ids=["awd", "adadecay", "parameter"],
)
def test_the_other_policies_on_sharded_weights(
    policy: dict[str, Any], make_config: Config, write_config: Callable[..., Path], logs: Logs, tmp_path: Path
) -> None:
    common = {"weight_decay": {**policy, "base": 0.5}, "optimizer": {"name": "muon"}}
    one = train(make_config("one", **common), quiet=True).run
    run_ranks(write_config("two", **common, run={"distributed": "fsdp2"}))
    found, expected = logs(tmp_path / "two"), logs(one)
    # Muon computes in bfloat16.
    assert [line["loss"] for line in found[0]] == pytest.approx([line["loss"] for line in expected[0]], abs=2e-2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("ddp", "one", marks=pytest.mark.slow),
        pytest.param("one", "fsdp2", marks=pytest.mark.slow),
        ("fsdp2", "ddp"),
    ],
)
def test_the_number_of_ranks_may_change(
    before: str, after: str, make_config: Config, write_config: Callable[..., Path], logs: Logs, tmp_path: Path
) -> None:
    whole = train(make_config("whole"), quiet=True).run

    def go_on(kind: str, *resume: str) -> None:
        if kind == "one":
            config = write_config("changed")
            run_ranks(config, *resume, ranks=1)
        else:
            run_ranks(write_config("changed", run={"distributed": kind}), *resume)

    go_on(before)
    for name in ("step_000010", "step_000012"):  # as if it had been killed after step 5
        (tmp_path / "changed/checkpoints" / name / "esdtool_checkpoint.json").unlink()
    go_on(after, "--resume", "auto")
    assert_same(logs(tmp_path / "changed"), logs(whole))


def test_a_failure_of_the_first_rank_ends_the_others(
    make_config: Config, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    train(make_config("used", schedule={"steps": 1, "warmup_steps": 0}), quiet=True)
    error = run_ranks(write_config("used"), check=False)
    assert "already holds a run" in error


def test_fsdp2_without_ranks_is_refused(make_config: Config) -> None:
    from esdtool.errors import ConfigError

    with pytest.raises(ConfigError, match="torchrun --nproc-per-node N"):
        train(make_config(run={"distributed": "fsdp2"}), quiet=True)


@pytest.mark.parametrize(("victim", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL)])
def test_the_others_end_with_a_line_when_a_rank_dies(
    victim: int, number: signal.Signals, write_config: Callable[..., Path], logs: Logs, tmp_path: Path
) -> None:
    config = write_config("torn", schedule={"steps": 4000}, checkpoint={"every": 5}, eval={"every": 4000})
    processes = start_ranks(["-m", "esdtool", "train", str(config), "--quiet"], 2)
    while not (tmp_path / "torn/checkpoints/step_000005").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[victim].send_signal(number)
    _, error = processes[1 - victim].communicate(timeout=60)
    processes[victim].communicate()
    assert processes[1 - victim].returncode == 1
    assert error == f"esdtool: error: rank {victim} ended before its work was done; go on with --resume auto\n"


FAILING = """
import os, sys
from esdtool.__main__ import main
from esdtool.errors import ConfigError
from esdtool.train import loop

def fail(*args, **options):
    if os.environ["RANK"] == "1":
        raise ConfigError("this text is not here")
    return found(*args, **options)

found = getattr(loop, sys.argv[1])
setattr(loop, sys.argv.pop(1), fail)
main()
"""


@pytest.mark.parametrize("where", ["open_data", "build_model", "summed_loss"])
def test_what_fails_on_one_rank_is_said_once(where: str, write_config: Callable[..., Path]) -> None:
    """Before the training, rank 0 says it; in its midst, the rank itself."""
    processes = start_ranks(["-c", FAILING, where, "train", str(write_config("one")), "--quiet"], 2)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "Traceback" not in "".join(errors)
    assert "".join(errors).count("rank 1: this text is not here") == 1
    if where != "summed_loss":
        assert errors[1] == ""


def test_an_impossible_number_of_ranks_is_one_line(write_config: Callable[..., Path]) -> None:
    config = write_config("odd")
    for size in ("abc", "0", "-1", "2.5"):
        done = subprocess.run(
            [sys.executable, "-m", "esdtool", "train", str(config)],
            env=os.environ | {"WORLD_SIZE": size},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert f"WORLD_SIZE='{size}'" in done.stderr
