"""Write what a monitor reads: to TensorBoard, to Weights & Biases, to a JSONL file, or to any function."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, Final, TextIO

from esdtool._version import __version__
from esdtool.errors import MissingExtraError
from esdtool.modules import WeightModule
from esdtool.optim.live_scores import LiveScore
from esdtool.optim.scalars import PREFIX
from esdtool.spectra.options import ScoreOptions
from esdtool.support.files import naming_the_file

FORMAT: Final = "esdtool.monitor"
VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The numbers of all modules at one time."""

    step: int
    """Number of the update in which they are there, from 1."""
    weights_step: int
    """Updates that the weights had had, if `step` is called before the optimizer's."""
    seconds: float
    """Seconds for which training waited."""
    scores: Mapping[str, LiveScore]
    """By module."""
    scalars: Mapping[str, float]
    """Flat numbers, see `esdtool.optim.scalars.scalars`."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """Describe to writers what a monitor follows."""

    modules: tuple[WeightModule, ...]
    """In the model's order."""
    options: ScoreOptions
    measures: tuple[str, ...]
    model_type: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]


class MonitorWriter(ABC):
    """A place that readings are written to."""

    def open(self, description: Description, *, update_step: int) -> None:  # noqa: B027 - nothing to do for most
        """Hear what will be written, before the first reading and after a state was loaded.

        Args:
            description: the modules and the measures.
            update_step: updates done; what an earlier attempt wrote of later ones does not count.
        """

    @abstractmethod
    def write(self, reading: Reading) -> None:
        """Write one reading. Any error is reported once, and training goes on."""

    def close(self) -> None:  # noqa: B027 - nothing to do for most
        """Close what the writer has opened itself."""


Function = Callable[..., object]
"""A function that takes scalars by name and, as `step`, the number of the update."""


class FunctionWriter(MonitorWriter):
    """Call a function of a trainer's own logger: `accelerator.log`, `wandb.log`, torchtitan's `logger.log`.

    Args:
        function: called as `function(scalars, step=step)`.
        prefix: what stands before each name.
    """

    def __init__(self, function: Function, *, prefix: str = PREFIX) -> None:
        self._function, self._prefix = function, prefix

    def write(self, reading: Reading) -> None:
        """Call the function."""
        self._function(_prefixed(reading.scalars, self._prefix), step=reading.step)


class TensorBoardWriter(MonitorWriter):
    """Write the scalars to TensorBoard.

    Args:
        target: a folder, or a `SummaryWriter` that stays open.
        prefix: what stands before each name.

    Raises:
        MissingExtraError: if tensorboard is not installed.
    """

    def __init__(self, target: str | PathLike[str] | Any, *, prefix: str = PREFIX) -> None:
        self._prefix = prefix
        self._owned = isinstance(target, str | PathLike)
        if self._owned:
            try:
                writer = import_module("torch.utils.tensorboard").SummaryWriter
            except ImportError as error:
                raise MissingExtraError("TensorBoardWriter", "train") from error
            with naming_the_file(Path(target)):
                target = writer(str(target))
        self._board: Any = target

    def write(self, reading: Reading) -> None:
        """Add each scalar."""
        for name, value in _prefixed(reading.scalars, self._prefix).items():
            self._board.add_scalar(name, value, reading.step)

    def close(self) -> None:
        """Close the writer, unless it was given."""
        if self._owned:
            self._board.close()


class WandbWriter(MonitorWriter):
    """Write the scalars to a run of Weights & Biases.

    Args:
        run: from `wandb.init()`; None: the run that is active.
        prefix: what stands before each name.

    Raises:
        MissingExtraError: if wandb is not installed.
    """

    def __init__(self, run: Any = None, *, prefix: str = PREFIX) -> None:
        self._prefix = prefix
        if run is None:
            try:
                run = import_module("wandb")
            except ImportError as error:
                raise MissingExtraError("WandbWriter", "wandb") from error
        self._run = run

    def write(self, reading: Reading) -> None:
        """Log the scalars beside what the loop itself logs, under a step of their own that may not go back."""
        scalars = _prefixed(reading.scalars, self._prefix)
        self._run.log({**scalars, f"{self._prefix}spectra_step": reading.step})


class JsonLinesWriter(MonitorWriter):
    """Write the numbers of every module to a JSONL file, which `esdtool plot` and `esdtool compare` read.

    Its first line describes the modules; each further line is one reading. A run that goes on appends to it, and one
    that starts afresh makes what is there void.

    Args:
        path: the file.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = Path(path)
        self._stream: TextIO | None = None
        self._header: dict[str, Any] = {}
        self._measures: tuple[str, ...] = ()

    def open(self, description: Description, *, update_step: int) -> None:
        """Keep the description for the next reading, which it will stand before."""
        self.close()
        self._measures = tuple(dict.fromkeys((*description.measures, *_ALWAYS)))
        self._header = {
            "format": FORMAT,
            "version": VERSION,
            "created_by": f"esdtool {__version__}",
            "start_step": update_step,
            "model_type": description.model_type,
            "settings": _settings(description),
            "modules": [_described(module) for module in description.modules],
        }

    def write(self, reading: Reading) -> None:
        """Append a line, after the description if it is the first."""
        with naming_the_file(self._path):
            if self._stream is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._stream = self._path.open("a", encoding="utf-8")
                self._stream.write(json.dumps(self._header, allow_nan=False) + "\n")
            line = {
                "step": reading.step,
                "weights_step": reading.weights_step,
                "seconds": reading.seconds,
                "modules": {name: self._numbers(score) for name, score in reading.scores.items()},
            }
            self._stream.write(json.dumps(line, allow_nan=False) + "\n")
            self._stream.flush()

    def _numbers(self, score: LiveScore) -> dict[str, Any]:
        numbers = {name: score.numbers[name] for name in self._measures if name in score.numbers}
        return numbers if score.status == "ok" else {"status": score.status, **numbers}

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


_ALWAYS: Final = ("alpha", "alpha_stderr", "mp_alpha", "num_tail")
"""Numbers that a comparison needs."""


class Writers:
    """Several places to write to, of which a failing one does not stop training.

    Args:
        writers: writers, or functions for `FunctionWriter`.
    """

    def __init__(self, writers: tuple[MonitorWriter | Function, ...]) -> None:
        self._writers = tuple(
            writer if isinstance(writer, MonitorWriter) else FunctionWriter(writer) for writer in writers
        )
        self._failed: set[int] = set()

    def open(self, description: Description, *, update_step: int) -> None:
        """Tell all writers what will be written."""
        for number, writer in enumerate(self._writers):
            self._try(number, lambda writer=writer: writer.open(description, update_step=update_step))  # type: ignore[misc]

    def write(self, reading: Reading) -> None:
        """Let all writers write; one that fails is warned of once, and tried again next time."""
        for number, writer in enumerate(self._writers):
            self._try(number, lambda writer=writer: writer.write(reading))  # type: ignore[misc]

    def close(self) -> None:
        """Close all writers."""
        for number, writer in enumerate(self._writers):
            self._try(number, writer.close)

    def _try(self, number: int, action: Callable[[], None]) -> None:
        try:
            action()
        # Whatever a foreign logger raises: a dashboard is no reason to lose a run.
        except Exception as error:
            if number not in self._failed:
                self._failed.add(number)
                warnings.warn(
                    f"SpectralMonitor: {type(self._writers[number]).__name__} failed and training goes on: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=4,
                )


def _prefixed(scalars: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in scalars.items()}


def _described(module: WeightModule) -> dict[str, Any]:
    """Return the part of a `ModuleResult` that does not change."""
    return {
        "name": module.name,
        "parameter": module.parameter,
        "role": module.role,
        "layer": module.layer,
        "expert": module.expert,
        "shape": module.shape,
        "parameter_shape": module.parameter_shape,
        "dtype": module.dtype,
        "rank": module.rank,
        "num_eigs": module.num_eigs,
    }


def _settings(description: Description) -> dict[str, Any]:
    """Return the `Settings` of the readings."""
    options = description.options
    uses_farms = "farms" in options.fit
    return {
        "fit": options.fit,
        "k_fraction": options.k_fraction,
        "min_eigs": options.min_eigs,
        "spectrum": options.spectrum,
        "fast": options.fast,
        "filter_zeros": options.filter_zeros,
        "fix_finger_bound": options.fix_finger_bound,
        "farms_rows": options.farms_rows if uses_farms else None,
        "farms_ratio": options.farms_ratio if uses_farms else None,
        "farms_windows": options.farms_windows if uses_farms else None,
        "include": description.include,
        "exclude": description.exclude,
    }
