"""Runs the runs of a sweep that are not finished, each in a process of its own, several at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TextIO

from esdtool.errors import ConfigError, OutputError
from esdtool.support.files import atomic_write_text
from esdtool.support.threads import available_cores
from esdtool.train.config.loading import load_run_config, to_toml
from esdtool.train.config.train_config import TrainConfig, is_immaterial
from esdtool.train.run.log import CONFIG, METRICS, read_lines
from esdtool.train.run.manifest import list_checkpoints
from esdtool.train.signals import StopSignals
from esdtool.train.sweep.plan import SweepPlan, SweepRun

State = Literal["new", "begun", "finished"]

_POLL_SECONDS: Final = 0.2


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The outcome of one run."""

    run: SweepRun
    outcome: Literal["begun", "finished", "failed", "elsewhere"]
    """`elsewhere`: another process is working on it."""
    seconds: float = 0.0
    perplexity: float | None = None
    """At the end, on the validation text."""
    message: str = ""
    """Why it failed: the last line that it wrote."""


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The outcome of a sweep."""

    finished: tuple[SweepRun, ...]
    """Also those that were finished before."""
    failed: tuple[Progress, ...]
    elsewhere: tuple[SweepRun, ...]
    stopped_by: int | None
    """Number of the signal that stopped it, or None."""


def state_of(run: SweepRun) -> State:
    """Return the progress of a run.

    Raises:
        ConfigError: if its folder holds a run with other settings.
    """
    folder = run.folder
    if not (folder / CONFIG).is_file():
        return "new"
    differing = _differences(load_run_config(folder / CONFIG), run.config)
    if differing:
        raise ConfigError(
            f"{folder} holds a run with another {' and '.join(differing)}: remove it, or choose another dir in [sweep]"
        )
    if (folder / "final").is_dir() and final_perplexity(run) is not None:
        return "finished"
    return "begun" if list_checkpoints(folder) else "new"


def final_perplexity(run: SweepRun) -> float | None:
    """Validation perplexity at the last step of the schedule, or None."""
    if not (run.folder / METRICS).is_file():
        return None
    for line in reversed(read_lines(run.folder / METRICS)):
        if line["split"] == "validation" and line["step"] == run.config.schedule.steps:
            found = line["perplexity"]
            return None if found is None else float(found)
    return None


def run_sweep(
    plan: SweepPlan,
    *,
    states: Sequence[State] | None = None,
    jobs: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> SweepResult:
    """Run what is not finished. A run that was stopped goes on from its last checkpoint.

    A run that fails does not stop the others. SIGINT and SIGTERM let the runs in progress save a checkpoint.
    Several processes may work on one sweep: each leaves alone what another one has begun.

    Args:
        plan: of `plan_sweep`.
        states: `state_of` each run, if the caller has asked already.
        jobs: runs at a time; default the plan's. With more than one, each sees one GPU where there are several, and
            has its share of the cores unless run.threads says otherwise.
        on_progress: called when a run begins or goes on, and when it ends.

    Raises:
        ConfigError: if a folder holds a run with other settings, before any run is begun.
        OutputError: if the folder cannot be written.
    """
    jobs = jobs or plan.jobs
    known = list(zip(plan.runs, states or map(state_of, plan.runs), strict=True))
    finished = [run for run, state in known if state == "finished"]
    waiting = [run for run, state in known if state != "finished"]
    failed: list[Progress] = []
    elsewhere: list[SweepRun] = []
    slots: list[_Process | None] = [None] * jobs

    def report(progress: Progress) -> None:
        if progress.outcome == "finished":
            finished.append(progress.run)
        elif progress.outcome == "failed":
            failed.append(progress)
        elif progress.outcome == "elsewhere":
            elsewhere.append(progress.run)
        if on_progress is not None:
            on_progress(progress)

    with StopSignals() as signals:
        try:
            while any(slots) or (waiting and signals.received is None):
                for slot, process in enumerate(slots):
                    if process is not None and (progress := process.ended()) is not None:
                        slots[slot] = None
                        if signals.received is None or progress.outcome == "finished":
                            report(progress)
                    if slots[slot] is None and waiting and signals.received is None:
                        slots[slot] = _begin(waiting.pop(0), slot, jobs, report)
                if signals.received is not None:
                    _stop(slots)
                time.sleep(_POLL_SECONDS)
        finally:
            _stop(slots)
    return SweepResult(
        finished=tuple(finished), failed=tuple(failed), elsewhere=tuple(elsewhere), stopped_by=signals.received
    )


class _Process:
    """`esdtool train` at work on one run."""

    def __init__(self, run: SweepRun, log: TextIO, environment: dict[str, str]) -> None:
        self.run = run
        self._began = time.perf_counter()
        self._stopped = False
        config = run.folder.with_suffix(".toml")
        atomic_write_text(config, to_toml(run.config))
        command = [sys.executable, "-m", "esdtool", "train", str(config), "--resume", "auto", "--quiet"]
        # A session of its own: Ctrl-C comes to us alone, and each run gets one signal and no second one.
        self._popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )

    def ended(self) -> Progress | None:
        """Return the outcome, or None while the run is in progress."""
        if self._popen.poll() is None:
            return None
        seconds = time.perf_counter() - self._began
        perplexity = final_perplexity(self.run)
        if self._popen.returncode == 0 and perplexity is not None:
            return Progress(run=self.run, outcome="finished", seconds=seconds, perplexity=perplexity)
        message = _last_line(_log_path(self.run)) or f"it ended with exit code {self._popen.returncode}"
        return Progress(run=self.run, outcome="failed", seconds=seconds, message=message)

    def stop(self) -> None:
        """Ask it, once, to save a checkpoint and end."""
        if not self._stopped:
            self._stopped = True
            with suppress(ProcessLookupError):
                self._popen.terminate()


def _begin(run: SweepRun, slot: int, jobs: int, report: Callable[[Progress], None]) -> _Process | None:
    """Start a run, unless another process has it, or had it and finished it meanwhile."""
    try:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        log = _log_path(run).open("a", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{run.folder.parent}: cannot write: {error.strerror}") from error
    with log:  # the run keeps its own handle of it, and with it the lock
        if not _lock(log):
            report(Progress(run=run, outcome="elsewhere"))
            return None
        if state_of(run) == "finished":
            report(Progress(run=run, outcome="finished", perplexity=final_perplexity(run)))
            return None
        process = _Process(run, log, _environment(slot, jobs))
    report(Progress(run=run, outcome="begun"))
    return process


def _lock(file: TextIO) -> bool:
    """Return whether nobody else holds this run. The lock lives as long as the run's process, even if ours ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """Make a copy of our environment, with a share of the cores and of the GPUs for one of several runs."""
    environment = dict(os.environ)
    if jobs == 1:
        return environment
    environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // jobs)))
    gpus = _gpus()
    if len(gpus) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _stop(slots: Sequence[_Process | None]) -> None:
    for process in slots:
        if process is not None:
            process.stop()


def _log_path(run: SweepRun) -> Path:
    return run.folder.with_suffix(".log")


def _last_line(path: Path) -> str:
    try:
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1].removeprefix("esdtool: error: ") if lines else ""


def _differences(found: TrainConfig, wanted: TrainConfig) -> list[str]:
    before = found.flat()
    return [key for key, value in wanted.flat().items() if not is_immaterial(key) and before.get(key) != value]
