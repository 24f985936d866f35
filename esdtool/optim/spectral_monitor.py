"""Follow the spectra of a model during training, without changing anything."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from esdtool.errors import AssignmentError, UsageError
from esdtool.modules.base import cost
from esdtool.optim.live_scores import NUMBERS, LiveScore, Measure
from esdtool.optim.measurements import Measurements
from esdtool.optim.measurements import Reading as ScoreReading
from esdtool.optim.monitor_writers import Description, Function, MonitorWriter, Reading, Writers
from esdtool.optim.monitored import monitored
from esdtool.optim.parameters import live_model
from esdtool.optim.scalars import LEVELS, Level, Place, scalars
from esdtool.optim.schedule import SpectralSchedule
from esdtool.optim.shared_scores import Compute, LiveRanks, live_scores
from esdtool.optim.time_share import TimeShare
from esdtool.spectra.options import ScoreOptions

MEASURES: Final = ("alpha", "stable_rank", "spectral_norm", "frobenius_norm", "effective_rank")
"""The numbers that a monitor gives by default."""

_STATE_VERSION: Final = 1


class SpectralMonitor:
    """Measure the spectra of the weights every so many updates. The model and the optimizer stay as they are.

    Step it once per update, before `optimizer.step()`, as `AlphaDecay`:

        monitor = SpectralMonitor(model, every=500, writers=[TensorBoardWriter("runs/spectra")])
        for batch in batches:
            loss(model, batch).backward()
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()
        monitor.close()

    When: the n-th call (n = 1, 2, ...) measures if n is a multiple of `every`, and with `initial` the first one too. It
    sees the weights after n - 1 updates. With `delay` N it only takes a snapshot, threads compute beside the training
    steps, and call n + N returns the numbers. With `max_seconds_share` a measurement waits for a later multiple of
    `every` if its predicted time would take the total beyond that share of the time since the first call. The time of
    the first one is predicted from one small module. With a delay, only the time for which training waits is counted.

    What: the weight matrices that `esdtool.analyze` scores and training changes. Of a model whose base is frozen and
    whose adapters are trained (LoRA and the other additive kinds of PEFT) it is the updates, `B A` with its scale,
    under the names of the weights that they are added to; an update that is still zero has no numbers. The numbers are
    those of `esdtool.analyze` on the same weights.

    With torch.distributed each spectrum is computed by one rank, `step` is a collective when it measures, all ranks
    return the same numbers and rank 0 writes them. Models sharded by FSDP2 are supported; FSDP1 and ZeRO-3 are refused.

    Args:
        model: the model, wrapped or not.
        every: updates between two measurements.
        measures: names of numbers in the analysis file: `alpha`, `stable_rank`, `entropy`, `log_norm`, ...
        delay: updates between a snapshot and its numbers, less than `every`.
        include: regular expressions on parameter names; if given, only matching matrices are measured.
        exclude: regular expressions on parameter names to leave out.
        max_seconds_share: largest share of the time that measurements may take, e.g. 0.01; None: no limit, and the
            measurements do not depend on the time.
        levels: what the scalars are of: `mean`, `role`, `layer`, `module`.
        writers: where readings are written: objects of `esdtool.optim.monitor_writers`, or functions that are called as
            `function(scalars, step=step)`, such as `accelerator.log`. One that fails is warned of, once.
        initial: measure in the first call of `step` too, which sees the initial weights.
        fit: estimator of alpha, or all options of the spectra.
        device: where to compute spectra; default the parameter's own device.
        jobs: spectra at a time on the CPU; default torch's number of threads, or with a delay 1 if the CPU also trains.
        compute: who computes, as for `AlphaDecay`.
        process_group: the ranks that share the model; default all.
        share: an `AlphaDecay` or `LayerwiseLR` of the same model, with the same `fit`, stepped beside the monitor:
            where both look at the weights of the same update, each spectrum is computed once.

    Raises:
        UsageError: for an option without such a value or a pattern that matches nothing.
        AssignmentError: if the model cannot be read.
        CheckpointError: if the model trains adapters whose updates cannot be computed.
        NothingToAnalyzeError: if no matrix is left to follow.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 500,
        *,
        measures: Sequence[str] = MEASURES,
        delay: int = 0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        max_seconds_share: float | None = None,
        levels: Sequence[Level] = LEVELS,
        writers: Sequence[MonitorWriter | Function] = (),
        initial: bool = False,
        fit: str | ScoreOptions = ScoreOptions.fit[0],
        device: torch.device | str | None = None,
        jobs: int | None = None,
        compute: Compute = "all-ranks",
        process_group: Any = None,
        share: SpectralSchedule | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(f"every must be a whole number of updates, at least 1, not {every!r}")
        if isinstance(delay, bool) or not isinstance(delay, int) or not 0 <= delay < every:
            raise UsageError(f"delay must be a whole number of updates, less than every {every}, not {delay!r}")
        if jobs is not None and jobs < 1:
            raise UsageError(f"jobs must be at least 1, not {jobs}")
        if not isinstance(model, nn.Module):
            raise AssignmentError(f"{type(model).__name__} is no torch module: it is SpectralMonitor(model, every)")
        self.every, self.delay = every, delay
        self.measures = _known(measures, NUMBERS, "measure")
        self.levels: tuple[Level, ...] = _known(levels, LEVELS, "level")  # type: ignore[assignment]
        self.update_step = 0
        """Calls of `step` so far."""
        self.last_reading: Reading | None = None
        """The last numbers, with the step and the state of each module."""
        self._initial = initial
        self._time = TimeShare(max_seconds_share)
        self._jobs = jobs
        measure = Measure.of("alpha", fit, device, full=True)
        live = live_model(model)
        chosen = monitored(live, measure, include=tuple(include), exclude=tuple(exclude))
        self._chosen = chosen
        self.skipped: Mapping[str, str] = chosen.skipped
        """Weight matrices that are not followed, each with the reason."""
        self._places = {module.name: Place.of((module,)) for module in chosen.modules}
        ranks = LiveRanks(compute, process_group)
        ranks.check_same(list(self._places))
        self._measurements = Measurements(ranks, jobs) if share is None else share.measurements
        self._ranks = self._measurements.ranks
        self._number = self._measurements.join(chosen.measure)
        self._pending: tuple[int, float, ScoreReading] | None = None
        """The update of a snapshot, seconds it took, and the scores under way."""
        self._predicted: float | None = None
        """Seconds that the next measurement is expected to take."""
        self._writers = Writers(tuple(writers) if self._ranks.rank == 0 else ())
        self._description = Description(
            modules=chosen.modules,
            options=measure.options,
            measures=self.measures,
            model_type=live.checkpoint.model_type,
            include=tuple(include),
            exclude=tuple(exclude),
        )
        self._writers.open(self._description, update_step=0)

    def step(self) -> dict[str, float] | None:
        """Call once per update: measures if it is time.

        Returns:
            Scalars by name (`alpha/mean`, `alpha/role/q_proj`, `alpha/layer/0`, `alpha/module/NAME`, ...), in the calls
            in which new numbers are there; None in all others.
        """
        self._time.start()
        self.update_step += 1
        found = None
        if self._pending is not None and self.update_step == self._pending[0] + self.delay:
            found = self._settled()
        if self._is_due():
            with self._time.counted():
                is_affordable = self._is_affordable()
            if is_affordable:
                numbers = self._measured()
                found = found if numbers is None else numbers
        return found

    def _is_due(self) -> bool:
        return self.update_step % self.every == 0 or (self._initial and self.update_step == 1)

    def measure(self) -> dict[str, float]:
        """Measure the weights as they are now, whether it is time or not. A collective.

        Returns:
            Scalars by name, as `step`.
        """
        self._drop()
        began = time.perf_counter()
        with self._time.counted():
            scores = self._read(beside=False).settle()
        self._predicted = time.perf_counter() - began
        return self._take(scores, weights_step=max(0, self.update_step - 1), seconds=self._predicted)

    def _measured(self) -> dict[str, float] | None:
        if not self.delay:
            return self.measure()
        self._drop()
        began = time.perf_counter()
        with self._time.counted():
            reading = self._read(beside=True)
        self._pending = self.update_step, time.perf_counter() - began, reading
        return None

    def _settled(self) -> dict[str, float]:
        assert self._pending is not None
        update_step, seconds, reading = self._pending
        self._pending = None
        began = time.perf_counter()
        with self._time.counted():
            scores = reading.settle()
        self._predicted = seconds + time.perf_counter() - began
        return self._take(scores, weights_step=update_step - 1, seconds=self._predicted)

    def _read(self, *, beside: bool) -> ScoreReading:
        return self._measurements.read(
            self._number, self.update_step, self._chosen.held, self._chosen.measure, beside=beside
        )

    def _take(self, found: Sequence[Sequence[LiveScore]], *, weights_step: int, seconds: float) -> dict[str, float]:
        scores = dict(zip(self._places, (score for held in found for score in held), strict=True))
        values = {
            measure: {name: score.numbers[measure] for name, score in scores.items() if measure in score.numbers}
            for measure in self.measures
        }
        self.last_reading = Reading(
            step=self.update_step,
            weights_step=weights_step,
            seconds=seconds,
            scores=scores,
            scalars=scalars(values, self._places, levels=self.levels),
        )
        with self._time.counted():
            self._writers.write(self.last_reading)
        return dict(self.last_reading.scalars)

    def _is_affordable(self) -> bool:
        """Tell whether a measurement stays within the share of the time, the same on every rank."""
        if self._time.limit is None:
            return True
        if self._predicted is None:
            self._predicted = self._trial()
        return all(self._ranks.gather(self._time.affords(self._predicted)))

    def _trial(self) -> float:
        """Predict the seconds of all spectra from those of the module that takes least, after one to warm up."""
        held = self._chosen.held
        work = {parameter: sum(map(cost, modules)) for parameter, modules in held.items()}
        least = min(work, key=lambda parameter: work[parameter])
        seconds = 0.0
        for _ in range(2):
            began = time.perf_counter()
            live_scores(
                [held[least]],
                [self._chosen.measure.operands(least)],
                self._chosen.measure,
                ranks=self._ranks,
                jobs=self._jobs,
            )
            seconds = time.perf_counter() - began
        return seconds * sum(work.values()) / work[least]

    @property
    def seconds_share(self) -> float:
        """Share of the time since the first call of `step` that training waited for the monitor."""
        return self._time.share

    @property
    def last_alphas(self) -> dict[str, float | None]:
        """Alpha of each module at the last measurement; None where there is none. Empty before the first one."""
        return {} if self.last_reading is None else {name: s.alpha for name, s in self.last_reading.scores.items()}

    @property
    def last_notes(self) -> dict[str, str]:
        """Why modules had no numbers at the last measurement."""
        scores = {} if self.last_reading is None else self.last_reading.scores
        return {name: score.status for name, score in scores.items() if score.status != "ok"}

    def state_dict(self) -> dict[str, Any]:
        """Return the counter. A measurement under way is not kept: it only shows what was."""
        return {"version": _STATE_VERSION, "update_step": self.update_step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on counting where a saved monitor stopped.

        Raises:
            AssignmentError: if the state is of another version.
        """
        if state_dict.get("version") != _STATE_VERSION:
            raise AssignmentError(
                f"SpectralMonitor state of version {state_dict.get('version')!r} is not supported "
                f"(this is {_STATE_VERSION})"
            )
        self.resume(int(state_dict["update_step"]))

    def resume(self, update_step: int) -> None:
        """Go on counting after so many updates, where a trainer keeps the number itself."""
        self._drop()
        self.update_step = update_step
        self._writers.open(self._description, update_step=self.update_step)

    def close(self) -> None:
        """Give up a measurement under way, and close the writers."""
        self._drop()
        self._writers.close()

    def _drop(self) -> None:
        if self._pending is not None:
            self._pending[2].drop()
            self._pending = None


def _known(names: Sequence[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    for name in names:
        if name not in known:
            raise UsageError(f"unknown {what} {name!r}; choose from {', '.join(known)}")
    if not names:
        raise UsageError(f"at least one {what} is needed; choose from {', '.join(known)}")
    return names
