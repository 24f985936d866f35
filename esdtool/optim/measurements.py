"""Compute the scores of a live model at one update once, for all schedules that follow them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from esdtool.modules import WeightModule
from esdtool.optim.live_scores import LiveScore, Measure
from esdtool.optim.pending import PendingScores
from esdtool.optim.shared_scores import LiveRanks, live_scores

Held = Mapping[nn.Parameter, tuple[WeightModule, ...]]
"""The modules that each parameter holds, the same on every rank, in the same order."""

Scores = list[list[LiveScore]]
"""One score a module, parameter by parameter."""

_Key = tuple[int, tuple[str, ...], Measure]
"""What tells one parameter's scores from others: the parameter's `id`, its modules, what is measured."""


@dataclass(kw_only=True, eq=False)
class _Batch:
    """Hold scores that were asked for together."""

    parameters: Mapping[_Key, nn.Parameter]
    """What is scored: kept, so that `id`s stay unique."""
    versions: Mapping[_Key, int]
    """How often each parameter had been changed in place when it was measured."""
    full: bool = False
    """Whether all numbers of the spectra are kept."""
    pending: PendingScores | None = None
    """The computation beside the training; None once its scores are there."""
    found: Scores | None = None
    waiting: set[int] = field(default_factory=set)
    """Numbers of the followers that have still to take them."""
    served: set[int] = field(default_factory=set)
    """Numbers of all followers that have asked for them."""

    def settle(self) -> Mapping[_Key, list[LiveScore]]:
        if self.found is None:
            assert self.pending is not None
            self.found, self.pending = self.pending.settle(), None
        return dict(zip(self.parameters, self.found, strict=True))

    def serves(self, follower: int, keys: Iterable[_Key], *, full: bool) -> bool:
        """Tell whether some of these scores are here, of the weights as they are now, and new to the follower."""
        mine = [key for key in keys if key in self.parameters]
        is_alive = (self.found is not None or self.pending is not None) and (self.full or not full)
        is_current = all(self.parameters[key]._version == self.versions[key] for key in mine)
        return is_alive and bool(mine) and follower not in self.served and is_current


class Reading:
    """Hold the scores that one schedule has asked for, there or under way."""

    def __init__(self, follower: int, keys: list[_Key], batches: list[_Batch]) -> None:
        self._follower, self._keys, self._batches = follower, keys, batches

    def settle(self) -> Scores:
        """Wait for the scores. A collective where they are under way and several ranks share them.

        Raises:
            RuntimeError: on every rank, if the computation failed on one.
        """
        found: dict[_Key, list[LiveScore]] = {}
        for batch in self._batches:
            found |= batch.settle()
        return [found[key] for key in self._keys]

    def drop(self) -> None:
        """Give the scores up; what no other schedule waits for is computed no further."""
        for batch in self._batches:
            batch.waiting.discard(self._follower)
            if not batch.waiting and batch.pending is not None:
                batch.pending.drop()
                batch.pending = None


class Measurements:
    """Keep what the schedules of one model have measured at the current update.

    A schedule that asks for what another one has asked for at the same update, of the same weights, gets the same
    scores. What a schedule asks for a second time is measured again.

    Args:
        ranks: who shares the work.
        jobs: modules at a time, on the CPU; None for the defaults of `live_scores` and `PendingScores`.
    """

    def __init__(self, ranks: LiveRanks, jobs: int | None) -> None:
        self.ranks = ranks
        self._jobs = jobs
        self._followers = 0
        self._full: set[Measure] = set()
        """Measures of which one of the followers wants all numbers."""
        self._update_step = 0
        self._batches: list[_Batch] = []

    def join(self, measure: Measure) -> int:
        """Return a number for one more follower, which will ask for this measure."""
        if measure.full:
            self._full.add(measure.score_alone)
        self._followers += 1
        return self._followers

    def read(self, follower: int, update_step: int, held: Held, measure: Measure, *, beside: bool) -> Reading:
        """Ask for the scores of the current weights. A collective where `ranks` has several.

        Args:
            follower: number of the schedule that asks.
            update_step: the update at which it asks.
            held: what to score.
            measure: the score.
            beside: take a snapshot and compute beside the training; otherwise the scores are there on return.
        """
        if update_step != self._update_step:
            self._update_step, self._batches = update_step, []
        wanted: dict[_Key, nn.Parameter] = {
            (id(parameter), tuple(module.name for module in modules), measure.score_alone): parameter
            for parameter, modules in held.items()
        }
        keys = list(wanted)
        batches = [batch for batch in self._batches if batch.serves(follower, keys, full=measure.full)]
        known = {key for batch in batches for key in batch.parameters}
        missing = [key for key in keys if key not in known]
        if missing:
            batches.append(self._measure({key: wanted[key] for key in missing}, held, measure, beside=beside))
        for batch in batches:
            batch.served.add(follower)
            batch.waiting.add(follower)
        reading = Reading(follower, keys, batches)
        if not beside:
            reading.settle()
        return reading

    def _measure(self, wanted: Mapping[_Key, nn.Parameter], held: Held, measure: Measure, *, beside: bool) -> _Batch:
        parameters = list(wanted.values())
        modules = [held[parameter] for parameter in parameters]
        operands = [measure.operands(parameter) for parameter in parameters]
        measure = replace(measure, full=measure.full or measure.score_alone in self._full)
        versions = {key: each._version for key, each in wanted.items()}
        batch = _Batch(parameters=wanted, versions=versions, full=measure.full)
        compute = partial(PendingScores if beside else live_scores, modules, operands, measure)
        result = compute(ranks=self.ranks, jobs=self._jobs)
        if isinstance(result, PendingScores):
            batch.pending = result
        else:
            batch.found = result
        if not measure.reads_gradients:
            self._batches.append(batch)
        return batch
