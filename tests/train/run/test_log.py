"""The logs of a run: damaged ones are one line, and at Weights & Biases every run is a run of its own."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esdtool.errors import ConfigError
from esdtool.train.config.loading import load_config
from esdtool.train.loop import train
from esdtool.train.run.log import read_lines
from esdtool.train.sweep.plan import plan_sweep

Config = Callable[..., Any]
GOOD = b'{"step": 1, "split": "train"}\n'


@pytest.mark.parametrize(
    "line", [b"[1]", b"3", b"null", b"{}", b'{"step": "1"}', b'{"step": true}', b"[" * 100_000, b"\xff", b'{"step": 1']
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(ConfigError, match=rf"{path}: line 2 ") as caught:
        read_lines(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", "decay.jsonl"])
def test_a_damaged_log_stops_the_resuming_in_one_line(make_config: Config, name: str) -> None:
    config = make_config(schedule={"steps": 6})
    run = train(config, quiet=True).run
    lines = (run / name).read_bytes().splitlines(keepends=True)
    (run / name).write_bytes(lines[0] + b'"step"\n' + lines[-1])
    with pytest.raises(ConfigError, match=rf"{name}: line 2 is no line of this log"):
        train(config, resume="auto", quiet=True)


class FakeWandb(types.ModuleType):
    """Keeps what every run is opened with."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.opened: list[dict[str, Any]] = []

    def init(self, **options: Any) -> FakeWandb:
        self.opened.append(options)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        pass

    def finish(self) -> None:
        pass


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


SHORT = {"schedule": {"steps": 2, "warmup_steps": 0}, "checkpoint": {"every": 1}, "eval": {"every": 9, "tokens": 100}}


def test_the_runs_of_a_sweep_do_not_share_an_id(
    wandb: FakeWandb, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    base = write_config("base", **SHORT, logging={"wandb": True})
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        f'[sweep]\nconfig = "{base}"\ndir = "{tmp_path}/out"\nseeds = [0, 1]\n'
        '[[grid]]\nweight_decay.policy = ["uniform", "none"]\n'
    )
    for run in plan_sweep(sweep).runs:
        train(run.config, quiet=True)
    assert len({options["id"] for options in wandb.opened}) == 4
    assert [options["name"] for options in wandb.opened] == [
        "uniform/seed-0",
        "none/seed-0",
        "uniform/seed-1",
        "none/seed-1",
    ]
    assert {options["resume"] for options in wandb.opened} == {"never"}


def test_an_id_is_kept_for_resuming_and_not_otherwise(wandb: FakeWandb, make_config: Config) -> None:
    config = make_config(**SHORT, logging={"wandb": True, "wandb_name": "first", "wandb_tags": ["a", "b"]})
    run = train(config, quiet=True).run
    train(config, resume="auto", quiet=True)
    first, resumed = wandb.opened
    assert (first["id"], "never") == (resumed["id"], first["resume"])
    assert resumed["resume"] == "allow"
    assert (first["name"], first["tags"], first["project"]) == ("first", ["a", "b"], "esdtool")
    assert load_config(run / "config.toml").logging.wandb_tags == ("a", "b")

    # Another run from a checkpoint of this one is not this one.
    branch = make_config("branch", **SHORT, logging={"wandb": True})
    train(branch, resume=str(run / "checkpoints/step_000001"), quiet=True)
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "esdtool_checkpoint.json").unlink()
    train(config, resume="auto", quiet=True)  # from the beginning, as no checkpoint is whole
    assert len({options["id"] for options in wandb.opened}) == 3
    assert wandb.opened[-1]["resume"] == "never"
