"""Write the logs of a run: metrics.jsonl, decay.jsonl, learning_rate.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from esdtool.errors import ConfigError, MissingExtraError
from esdtool.support.files import atomic_write, atomic_write_text, naming_the_file

if TYPE_CHECKING:
    from esdtool.modules import WeightModule
    from esdtool.train.config.train_config import TrainConfig
    from esdtool.train.learning_rate import RateRecord
    from esdtool.train.policy import DecayRecord

METRICS: Final = "metrics.jsonl"
DECAY: Final = "decay.jsonl"
RATES: Final = "learning_rate.jsonl"
CONFIG: Final = "config.toml"
WANDB_ID: Final = "wandb_id"
AVERAGED: Final = "averaged"
"""`split` of the line in metrics.jsonl that belongs to the mean of the last weights."""


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a .jsonl log; one that a killed run left half-written at the end is left out.

    Raises:
        ConfigError: if the file cannot be read, or a line in its middle is no JSON object with a step.
    """
    try:
        texts = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror}") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            if number < len(texts):
                raise ConfigError(f"{path}: line {number} is not JSON") from error
            continue
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise ConfigError(f"{path}: line {number} is no line of this log: it has no step")
        lines.append(line)
    return lines


def truncate_log(path: Path, step: int, *, evaluation_due: bool = False) -> None:
    """Drop the lines after `step`, all of them for 0: the run writes them again.

    Args:
        path: the log, which need not exist.
        step: updates done.
        evaluation_due: whether the evaluation at `step` is still to come, so that its line goes too.
    """
    if not path.exists():
        return

    def stays(line: Mapping[str, Any]) -> bool:
        is_repeated = evaluation_due and line["step"] == step and line.get("split") == "validation"
        return 0 < step >= line["step"] and not is_repeated

    kept = [line for line in read_lines(path) if stays(line)]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


class RunLog:
    """The log files of rank 0."""

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        modules: Mapping[str, WeightModule],
        *,
        start_step: int = 0,
        evaluation_due: bool = False,
        resumed: bool = False,
    ) -> None:
        """Open the logs behind what `start_step` updates wrote.

        Args:
            run: the run directory, which exists.
            config: for [logging].
            modules: the scored modules by name, for curves by role.
            start_step: updates done; later lines of an earlier attempt are dropped.
            evaluation_due: whether the evaluation at `start_step` is still to come.
            resumed: whether the run goes on where an earlier process stopped.

        Raises:
            OutputError: if a file cannot be written.
            MissingExtraError: if a logger's package is not installed.
        """
        self._run = run
        self._modules = modules
        truncate_log(run / METRICS, start_step, evaluation_due=evaluation_due)
        truncate_log(run / DECAY, start_step)
        truncate_log(run / RATES, start_step)
        # The external loggers first: what is not installed should not leave open files.
        self._wandb = _open_wandb(run, config, resumed=resumed) if config.logging.wandb else None
        self._board = _open_tensorboard(run, start_step) if config.logging.tensorboard else None
        self._metrics, self._decay = _open(run / METRICS), _open(run / DECAY)
        self._rates = None if config.learning_rate.policy == "uniform" else _open(run / RATES)

    def metrics(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, and to the others.

        Raises:
            OutputError: if it cannot be written.
        """
        _append(self._metrics, self._run / METRICS, {key: _finite(value) for key, value in line.items()})
        numbers = {
            f"{line['split']}/{key}": value
            for key, value in line.items()
            if key not in ("step", "split") and isinstance(value, int | float)
        }
        self._external(numbers, int(line["step"]))

    def decay(self, step: int, record: DecayRecord) -> None:
        """Append a refresh to decay.jsonl.

        Args:
            step: the update, counted from 1, that is the first with these decays; 0: those of the start.
            record: the refresh.
        """
        modules = {
            name: self._entry(name, decay.alpha, decay.score, weight_decay=decay.weight_decay)
            for name, decay in record.modules.items()
        }
        line = {"step": step, "weights_step": record.weights_step, "seconds": record.seconds, "modules": modules}
        _append(self._decay, self._run / DECAY, line)
        means = by_role(record, self._modules).items()
        self._external({f"{what}/{role}": mean for what, roles in means for role, mean in roles.items()}, step)

    def rates(self, step: int, record: RateRecord) -> None:
        """Append a refresh to learning_rate.jsonl.

        Args:
            step: the update, counted from 1, that is the first on the way to these ratios; 0: those of the start.
            record: the refresh.
        """
        assert self._rates is not None
        modules = {
            name: self._entry(name, rate.alpha, rate.score, ratio=rate.ratio) for name, rate in record.modules.items()
        }
        line = {"step": step, "weights_step": record.weights_step, "seconds": record.seconds, "modules": modules}
        _append(self._rates, self._run / RATES, line)
        ratios: dict[str, list[float]] = defaultdict(list)
        for name, rate in record.modules.items():
            ratios[self._modules[name].role if name in self._modules else name].append(rate.ratio)
        self._external({f"lr_ratio/{role}": sum(found) / len(found) for role, found in ratios.items()}, step)

    def _entry(self, name: str, alpha: float | None, score: float | None, **value: float) -> dict[str, Any]:
        """Return the entry of one module in a line."""
        entry: dict[str, Any] = {"alpha": alpha, **value}
        if name in self._modules:
            entry |= {"role": self._modules[name].role, "layer": self._modules[name].layer}
        if score is not None:
            entry["score"] = score
        return entry

    def _external(self, numbers: Mapping[str, float], step: int) -> None:
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)

    def close(self) -> None:
        """Close everything."""
        for stream, name in ((self._metrics, METRICS), (self._decay, DECAY), (self._rates, RATES)):
            if stream is not None:
                with naming_the_file(self._run / name):  # what a full disk did not take is tried once more
                    stream.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def by_role(record: DecayRecord, modules: Mapping[str, WeightModule]) -> dict[str, dict[str, float]]:
    """Return the mean alpha and mean decay of each role."""
    values: dict[str, dict[str, list[float]]] = {"alpha": defaultdict(list), "weight_decay": defaultdict(list)}
    for name, decay in record.modules.items():
        role = modules[name].role if name in modules else name
        values["weight_decay"][role].append(decay.weight_decay)
        if decay.alpha is not None:
            values["alpha"][role].append(decay.alpha)
    return {what: {role: sum(found) / len(found) for role, found in roles.items()} for what, roles in values.items()}


def _open(path: Path) -> TextIO:
    with naming_the_file(path):
        return path.open("a", encoding="utf-8")


def _append(stream: TextIO, path: Path, line: Mapping[str, Any]) -> None:
    with naming_the_file(path):
        stream.write(json.dumps(line, allow_nan=False) + "\n")
        stream.flush()


def sync_logs(run: Path) -> None:
    """Bring the logs to the disk: a checkpoint must not be ahead of them."""
    for name in (METRICS, DECAY, RATES):
        path = run / name
        if path.exists():
            with naming_the_file(path), path.open("rb") as stream:
                os.fsync(stream.fileno())


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_loggers(config: TrainConfig) -> None:
    """Refuse loggers of [logging] that are not installed.

    Raises:
        MissingExtraError: naming the extra to install.
    """
    if config.logging.tensorboard:
        _import("torch.utils.tensorboard", "logging.tensorboard = true", extra="train")
    if config.logging.wandb:
        _import("wandb", "logging.wandb = true", extra="wandb")


def _import(package: str, what: str, *, extra: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingExtraError(what, extra) from error


def _open_tensorboard(run: Path, start_step: int) -> Any:
    writer = _import("torch.utils.tensorboard", "logging.tensorboard = true", extra="train").SummaryWriter
    with naming_the_file(run / "tensorboard"):
        return writer(str(run / "tensorboard"), purge_step=start_step + 1 if start_step else 0)


def _open_wandb(run: Path, config: TrainConfig, *, resumed: bool) -> Any:
    return _import("wandb", "logging.wandb = true", extra="wandb").init(
        project=config.logging.wandb_project,
        dir=str(run),
        name=config.logging.wandb_name or _default_name(run),
        tags=list(config.logging.wandb_tags) or None,
        id=_wandb_id(run, resumed=resumed),
        resume="allow" if resumed else "never",
        config=config.model_dump(by_alias=True, mode="json"),
    )


def _wandb_id(run: Path, *, resumed: bool) -> str:
    """Return the id of this run at Weights & Biases: random, and kept in the run directory for those that resume it."""
    file = run / WANDB_ID
    if resumed and file.is_file():
        with naming_the_file(file):
            found = file.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[0-9a-f]{16}", found):
            return found
    made = secrets.token_hex(8)
    atomic_write_text(file, made + "\n")
    return made


def _default_name(run: Path) -> str:
    """Return the run directory's name; of a run of a sweep, `SETTING/seed-N`."""
    run = run.resolve()
    return f"{run.parent.name}/{run.name}" if re.fullmatch(r"seed-\d+", run.name) else run.name
