"""The policies that come from elsewhere in esdtool: the live schedule, and a wd.json applied once."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esdtool.assignment.document import load_assignment
from esdtool.errors import ConfigError
from esdtool.names import module_name
from esdtool.optim import AlphaDecay, apply
from esdtool.train.policies.base import Decay, Record, Target


class Spectral:
    """`alphadecay`: `esdtool.optim.AlphaDecay` with the settings of [weight_decay]."""

    def __init__(self, target: Target, *, resuming: bool) -> None:
        """Assign from the initial weights, unless `resuming` or `initial = false`.

        Raises:
            ConfigError: if no module is left to assign.
        """
        settings = target.config.weight_decay
        if not target.modules:
            raise ConfigError(
                'weight_decay.policy = "alphadecay": the model has no weight module to assign; see include and exclude'
            )
        is_linear = settings.assign == "linear"
        low, high = target.config.ratio_range
        began = time.perf_counter()
        self._schedule = AlphaDecay(
            target.model,
            list(target.optimizers),
            weight_decay=target.config.base_decay,
            interval=settings.interval,
            delay=settings.delay,
            min_ratio=low if is_linear else None,
            max_ratio=high if is_linear else None,
            fit=settings.score_options(),
            assign=settings.assign,
            score=settings.score,
            granularity=settings.granularity,
            normalize=settings.normalize,
            control=settings.control,
            control_seed=target.config.run.seed,
            # Exactly these: the patterns of the configuration speak of module names.
            include=[f"^{re.escape(module.parameter)}$" for module in target.modules],
            unlisted=settings.unlisted,
            initial=settings.initial and not resuming,
            compute=settings.compute,
        )
        self._seconds = time.perf_counter() - began
        self._snapshot_seconds = 0.0
        self._interval, self._delay = settings.interval, settings.delay
        self._assigns_at_start = settings.initial and settings.score != "gradient_norm"

    def step(self, grad_norm: float) -> Record | None:
        """See `Policy`."""
        del grad_norm
        began = time.perf_counter()
        self._schedule.step()
        seconds = time.perf_counter() - began
        if self._delay and self._schedule.update_step % self._interval == 0:
            self._snapshot_seconds = seconds
        measured = self._schedule.update_step - self._delay
        if measured <= 0 or measured % self._interval:
            return None
        return self._record(seconds + self._snapshot_seconds)

    def initial(self) -> Record | None:
        """See `Policy`."""
        return self._record(self._seconds)

    def state_dict(self) -> dict[str, Any]:
        """See `Policy`."""
        self._schedule.settle()
        return self._schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Policy`."""
        self._schedule.load_state_dict(state)

    def _record(self, seconds: float) -> Record:
        schedule = self._schedule
        alphas, scores, notes = schedule.last_alphas, schedule.last_scores, schedule.last_notes
        remark = None
        # Without scores at the start, all modules have the base decay because the configuration wants it.
        if notes and (schedule.update_step or self._assigns_at_start):
            name, reason = next(iter(notes.items()))
            remark = f"{len(notes)} of {len(scores)} modules are not scored, e.g. {module_name(name)}: {reason}"
        return Record(
            seconds=seconds,
            weights_step=max(0, schedule.update_step - self._delay - 1),
            remark=remark,
            modules={
                module_name(name): Decay(
                    weight_decay=decay,
                    alpha=alphas[name],
                    score=None if scores[name] == alphas[name] else scores[name],
                )
                for name, decay in schedule.last_decays.items()
            },
        )


class FromFile:
    """`file`: a wd.json, applied at the start and unchanged."""

    def __init__(self, target: Target) -> None:
        """Read the file and apply it.

        Raises:
            AssignmentError: if it is invalid or does not fit the model.
            ConfigError: if it was made for the other kind of decay.
        """
        settings = target.config.weight_decay
        assert settings.path is not None
        self._target = target
        self._assignment = load_assignment(Path(settings.path))
        kind = "l2" if target.config.optimizer.name == "adam" else "decoupled"
        if self._assignment.optimizer != kind:
            raise ConfigError(
                f'weight_decay.path {settings.path}: its decays are for "{self._assignment.optimizer}" weight decay, '
                f'but optimizer.name "{target.config.optimizer.name}" decays "{kind}"; '
                "make it anew with `esdtool assign --optimizer`"
            )
        self._apply()

    def _apply(self) -> None:
        target = self._target
        apply(list(target.optimizers), self._assignment, target.model, unlisted=target.config.weight_decay.unlisted)

    def step(self, grad_norm: float) -> Record | None:
        """See `Policy`."""
        del grad_norm
        return None

    def initial(self) -> Record | None:
        """See `Policy`."""
        entries: Mapping[str, Any] = self._assignment.parameters
        return Record(
            seconds=0.0,
            modules={
                module_name(name): Decay(weight_decay=entry.weight_decay, alpha=entry.alpha, score=entry.score)
                for name, entry in entries.items()
            },
        )

    def state_dict(self) -> dict[str, Any]:
        """See `Policy`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Policy`."""
        del state
        self._apply()
