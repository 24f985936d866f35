"""`alphadecay`: the method (He et al. 2025, arXiv 2506.14562), refreshed from the spectra of the current weights."""

from __future__ import annotations

import re
import time
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from esdtool.assignment.assign_options import AssignOptions
from esdtool.assignment.options import Control, GradientScoreName, LiveScoreName, OptimizerName
from esdtool.assignment.rule import PUBLISHED_RATIOS
from esdtool.errors import ConfigError
from esdtool.names import module_name
from esdtool.train.config.section import Count, NotNegative
from esdtool.train.config.spectral import SpectralKeys
from esdtool.train.policy import DecayRecord, ModuleDecay, PolicySettings, Target, kind_of_decay, unscored_remark


class AlphaDecaySettings(PolicySettings, SpectralKeys):
    """A decay for each module, from the spectra of the current weights (He et al. 2025)."""

    policy: Literal["alphadecay"] = "alphadecay"
    """`alphadecay`: per module, from the spectra of the current weights."""
    interval: Count = 500
    """Steps between two refreshes of the decays."""
    delay: Annotated[int, Field(ge=0)] = 0
    """Steps between the measurement of the weights and the first use of the decays, less than interval; the
    spectra are computed beside the training. 0: within the step, as published."""
    initial: bool = True
    """Assign from the initial weights too; false: base until the first refresh."""
    compute: Literal["all-ranks", "first-rank"] = "all-ranks"
    """Spread the spectra over the ranks (each module on one of them), or leave them to rank 0."""
    score: LiveScoreName = AssignOptions.score
    """The number that the decays follow. Some are definitions of the public code of AlphaDecay, and names that begin
    with `gradient` take the gradient before the update."""
    assign: Literal["linear", "sqrt", "log2", "sigmoid"] = "linear"
    """From scores to decays; `linear` is the method."""
    granularity: Literal["module", "layer", "role"] = "module"
    """Decay per module (the method), or the same for all modules of a layer or of a role."""
    min_ratio: NotNegative = PUBLISHED_RATIOS["adamw"][0]
    """linear: decay of the smallest score, over base."""
    max_ratio: NotNegative | None = None
    """linear: decay of the largest score, over base. Default: the published 5 for adamw (and muon), 3 for adam."""
    normalize: bool = False
    """Rescale so that the parameter-weighted mean of the decays is base: a fair comparison with uniform."""
    control: Control = "none"
    """What would show that the gain is not the method's. `mean`: each module gets the
    parameter-weighted mean of the method's decays; `shuffled`: the same decays, dealt to the modules at random (by
    run.seed, the same way at each refresh); `reversed`: the same decays in the opposite order."""
    differs_by_module: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.delay >= self.interval and self.delay:
            raise ValueError(f"weight_decay.delay {self.delay} is not less than weight_decay.interval {self.interval}")
        if self.max_ratio is not None and self.min_ratio > self.max_ratio:
            raise ValueError(
                f"weight_decay.min_ratio {self.min_ratio} is more than weight_decay.max_ratio {self.max_ratio}"
            )
        return self

    def defaults(self, optimizer: OptimizerName) -> dict[str, Any]:
        """Add the published maximum ratio to the defaults."""
        return super().defaults(optimizer) | {"max_ratio": self.ratio_range(optimizer)[1]}

    def check(self, optimizer_name: str) -> None:
        """Refuse ratios in the wrong order, one of which may be the default of the optimizer."""
        super().check(optimizer_name)
        low, high = self.ratio_range(kind_of_decay(optimizer_name))
        if low > high:
            raise ValueError(
                f"weight_decay.min_ratio {low} is more than weight_decay.max_ratio, "
                f"{high} for {optimizer_name} by default"
            )

    def ratio_range(self, optimizer: OptimizerName) -> tuple[float, float]:
        """(min_ratio, max_ratio), the published maximum where none is given."""
        maximum = PUBLISHED_RATIOS[optimizer][1] if self.max_ratio is None else self.max_ratio
        return self.min_ratio, maximum

    def start(self, target: Target) -> ScheduledAlphaDecay:
        """Start the policy on a model and its optimizers."""
        return ScheduledAlphaDecay(self, target)

    def rehearse(self, target: Target) -> None:
        """Refuse a model without a weight module to assign."""
        if not target.modules:
            raise ConfigError(
                'weight_decay.policy = "alphadecay": the model has no weight module to assign; see include and exclude'
            )


class ScheduledAlphaDecay:
    """`alphadecay`: `esdtool.optim.AlphaDecay` with the settings of [weight_decay]."""

    def __init__(self, settings: AlphaDecaySettings, target: Target) -> None:
        """Assign from the initial weights, unless a state will be loaded or `initial = false`.

        Raises:
            ConfigError: if no module is left to assign.
        """
        from esdtool.optim import AlphaDecay

        settings.rehearse(target)
        is_linear = settings.assign == "linear"
        low, high = settings.ratio_range(target.optimizer)
        began = time.perf_counter()
        self.schedule = AlphaDecay(
            target.model,
            list(target.optimizers),
            weight_decay=target.base_decay,
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
            control_seed=target.seed,
            # Exactly these: the patterns of the configuration speak of module names.
            include=[f"^{re.escape(module.parameter)}$" for module in target.modules],
            unlisted=settings.unlisted,
            initial=settings.initial and not target.resuming,
            compute=settings.compute,
        )
        self._seconds = time.perf_counter() - began
        self._snapshot_seconds = 0.0
        self._interval, self._delay = settings.interval, settings.delay
        self._assigns_at_start = settings.initial and settings.score not in get_args(GradientScoreName)

    def step(self, grad_norm: float) -> DecayRecord | None:
        """Set the decays of the next update."""
        del grad_norm
        began = time.perf_counter()
        self.schedule.step()
        seconds = time.perf_counter() - began
        if self._delay and self.schedule.update_step % self._interval == 0:
            self._snapshot_seconds = seconds
        measured = self.schedule.update_step - self._delay
        if measured <= 0 or measured % self._interval:
            return None
        return self._record(seconds + self._snapshot_seconds)

    def initial(self) -> DecayRecord | None:
        """Return the record of the initial decays, if there is one."""
        return self._record(self._seconds)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        self.schedule.settle()
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.schedule.load_state_dict(state)

    def _record(self, seconds: float) -> DecayRecord:
        schedule = self.schedule
        alphas, scores, notes = schedule.last_alphas, schedule.last_scores, schedule.last_notes
        # Without scores at the start, all modules have the base decay because the configuration wants it.
        is_known = schedule.update_step or self._assigns_at_start
        return DecayRecord(
            seconds=seconds,
            weights_step=max(0, schedule.update_step - self._delay - 1),
            remark=unscored_remark(notes, len(scores)) if is_known else None,
            modules={
                module_name(name): ModuleDecay(
                    weight_decay=decay,
                    alpha=alphas[name],
                    score=None if scores[name] == alphas[name] else scores[name],
                )
                for name, decay in schedule.last_decays.items()
            },
        )


POLICY = AlphaDecaySettings
