"""Define what schedules that follow the spectra of a live model share: when they look, at what, and their state."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from esdtool.errors import AssignmentError, UsageError
from esdtool.modules import WeightModule
from esdtool.optim import groups
from esdtool.optim.call_order import CallOrder
from esdtool.optim.live_scores import LiveScore, Measure
from esdtool.optim.managed import Managed, manage
from esdtool.optim.measurements import Measurements, Reading
from esdtool.optim.parameters import live_model
from esdtool.optim.scalars import LEVELS, Level, Place, scalars, shown_name
from esdtool.optim.shared_scores import Compute, LiveRanks

_LOG = logging.getLogger(__name__)

_STATE_VERSION = 1


class SpectralSchedule(ABC):
    """Renew values of the modules of a model that follow their spectra during training.

    A subclass says when spectra are due (`is_due`), what their scores mean (`_follow`) and how its values reach the
    optimizers (`apply`).
    """

    name: ClassVar[str]
    """What messages call it."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        interval: int,
        delay: int,
        measure: Measure,
        include: Sequence[str],
        exclude: Sequence[str],
        jobs: int | None,
        compute: Compute,
        process_group: Any,
        share: SpectralSchedule | None,
    ) -> None:
        """Find the modules. Nothing is measured or changed yet.

        Raises:
            UsageError: for an option without such a value or a pattern that matches nothing.
            AssignmentError: if the optimizer does not fit, or model and optimizer are exchanged.
            NothingToAnalyzeError: if no module is left.
        """
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise UsageError(f"interval must be a whole number of updates, at least 1, not {interval!r}")
        if isinstance(delay, bool) or not isinstance(delay, int) or not 0 <= delay < interval:
            raise UsageError(f"delay must be a whole number of updates, less than interval {interval}, not {delay!r}")
        if jobs is not None and jobs < 1:
            raise UsageError(f"jobs must be at least 1, not {jobs}")
        groups.check_order(model, optimizer, f"{self.name}(model, optimizer)")
        self.interval = interval
        self.delay = delay
        self.update_step = 0
        """Calls of `step` so far."""
        self._measure = measure
        ranks = LiveRanks(compute, process_group)
        self._managed: Managed = manage(
            live_model(model), groups.as_optimizers(optimizer), include=include, exclude=exclude, by=self.name
        )
        self.skipped: Mapping[str, str] = self._managed.skipped
        """Matrices that are not assigned although they could be scored, each with the reason."""
        remark = self._managed.scope.remark
        if remark is not None:
            level = logging.WARNING if self._managed.scope.is_surprising else logging.INFO
            _LOG.log(level, "%s: %s", self.name, remark)
        self._modules: Mapping[str, tuple[WeightModule, ...]] = self._managed.modules
        ranks.check_same(list(self._modules))
        self.measurements: Measurements = Measurements(ranks, jobs) if share is None else share.measurements
        self._number = self.measurements.join(measure)
        self._scores = {name: LiveScore(status="not computed yet") for name in self._modules}
        self.last_refresh: int | None = None
        """The call of `step` that put the present values in force, 0 for the construction; None before there are any
        and after a state was loaded."""
        self._reading: Reading | None = None
        """Scores under way."""
        self._late: list[list[LiveScore]] | None = None
        """Scores that wait for their step: of `_reading`, or of a loaded state."""
        self._order = CallOrder(self.name, groups.as_optimizers(optimizer))

    @abstractmethod
    def apply(self) -> None:
        """Write the values in force to the optimizers again."""

    @abstractmethod
    def _take(self, found: Sequence[Sequence[LiveScore]]) -> None:
        """Put the values of these scores in force: one score a module, parameter by parameter."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return counter, scores and values, as plain numbers, after waiting for a refresh under way."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, and write its values to the optimizers."""

    def is_due(self, update_step: int) -> bool:
        """Tell whether the spectra are looked at in the `update_step`-th call of `step`."""
        return update_step % self.interval == 0

    def step(self) -> None:
        """Call once per update, before `optimizer.step()`: renews the values if it is time, and writes them."""
        self._order.note_step()
        self.update_step += 1
        if self.delay and self.is_due(self.update_step - self.delay) and self.is_pending:
            self.settle()
            assert self._late is not None
            self._follow(self._late)
        elif not self.is_due(self.update_step):
            self.apply()
        elif self.delay:
            self._drop()
            self._reading = self._read(beside=True)
            self.apply()
        else:
            self.refresh()

    def refresh(self) -> None:
        """Compute the scores of the current weights now, and the values from them. A collective.

        A refresh under way beside the training is dropped.
        """
        self._follow(self._read(beside=False).settle())

    def restart(self) -> None:
        """Begin again at the weights as they are, as if no update had been made yet. A collective."""
        self._drop()
        self.update_step = 0
        self.refresh()

    def close(self) -> None:
        """Give up spectra under way, and leave the optimizers alone from now on."""
        self._order.close()
        self._drop()

    @property
    def is_pending(self) -> bool:
        """Whether values are under way: a snapshot was taken, and the step that puts them in force is to come."""
        return self._reading is not None or self._late is not None

    def settle(self) -> None:
        """Wait for the spectra under way, if any. A collective then. Their values still wait for their step.

        Raises:
            RuntimeError: on every rank, if the computation failed on one.
        """
        if self._reading is not None:
            try:
                self._late = self._reading.settle()
            finally:
                self._reading = None

    def _read(self, *, beside: bool) -> Reading:
        held = {self._managed.parameter(name): modules for name, modules in self._modules.items()}
        return self.measurements.read(self._number, self.update_step, held, self._measure, beside=beside)

    def _drop(self) -> None:
        if self._reading is not None:
            self._reading.drop()
        self._reading = self._late = None

    def _follow(self, found: Sequence[Sequence[LiveScore]]) -> None:
        self._drop()
        self._take(found)
        self.last_refresh = self.update_step
        self.apply()

    @property
    def last_alphas(self) -> dict[str, float | None]:
        """Alpha of each assigned parameter at the last refresh; None where there is none."""
        return {name: score.alpha for name, score in self._scores.items()}

    @property
    def last_scores(self) -> dict[str, float | None]:
        """What the values follow, of each assigned parameter at the last refresh: alpha itself unless chosen else."""
        return {name: score.value for name, score in self._scores.items()}

    @property
    @abstractmethod
    def _values(self) -> Mapping[str, Mapping[str, float]]:
        """The values in force of each assigned parameter, by their names in a dashboard."""

    def scalars(self, levels: Sequence[Level] = LEVELS) -> dict[str, float]:
        """Return alphas, scores and the values in force under the names that `SpectralMonitor` gives its numbers.

        Args:
            levels: what the scalars are of: `mean`, `role`, `layer`, `module`.
        """
        names = {name: shown_name(name, modules) for name, modules in self._modules.items()}
        measured = {"alpha": self.last_alphas}
        if self._measure.score != "alpha":
            measured[self._measure.score] = self.last_scores
        values: dict[str, dict[str, float]] = {
            quantity: {names[name]: value for name, value in found.items() if value is not None}
            for quantity, found in measured.items()
        }
        for quantity, in_force in self._values.items():
            values[quantity] = {names[name]: value for name, value in in_force.items() if name in names}
        return scalars(
            values, {names[name]: Place.of(modules) for name, modules in self._modules.items()}, levels=levels
        )

    def _state(self) -> dict[str, Any]:
        """Return what every schedule's state holds, after waiting for a refresh under way.

        Raises:
            RuntimeError: if there is one and several ranks share it, and `settle` was not called on all of them.
        """
        if self._reading is not None and self.measurements.ranks.size > 1:
            raise RuntimeError(f"a refresh is under way: call {self.name}.settle() on every rank before state_dict()")
        self.settle()
        return {
            "version": _STATE_VERSION,
            "update_step": self.update_step,
            "alphas": self.last_alphas,
            "scores": self.last_scores,
            "statuses": {name: score.status for name, score in self._scores.items()},
            "late": self._late
            and [[[score.status, score.alpha, score.value] for score in held] for held in self._late],
        }

    def _check_state(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        """Refuse a state that is not of this schedule.

        Args:
            state: what `state_dict` returned.
            names: the parameters that have ratios here.

        Raises:
            AssignmentError: if it is of another version or of other modules.
        """
        version = state.get("version")
        if version != _STATE_VERSION:
            raise AssignmentError(
                f"{self.name} state of version {version!r} is not supported (this is {_STATE_VERSION})"
            )
        ratios: Mapping[str, float] = state["ratios"]
        if ratios.keys() != set(names):
            name = min(ratios.keys() ^ set(names))
            where = "the state but not the model" if name in ratios else "the model but not the state"
            raise AssignmentError(f"the {self.name} state is of other modules: {name} is in {where}")

    def _load(self, state: Mapping[str, Any]) -> None:
        """Restore what `_state` returned."""
        self.update_step = int(state["update_step"])
        self.last_refresh = None
        self._scores = {
            name: LiveScore(status=state["statuses"][name], alpha=state["alphas"][name], value=state["scores"][name])
            for name in self._modules
        }
        self._drop()
        late = state.get("late")
        if late and self.delay:
            self._late = [[LiveScore(status=s, alpha=alpha, value=value) for s, alpha, value in held] for held in late]
