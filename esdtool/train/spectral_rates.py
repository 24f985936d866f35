"""Learning rates that follow the spectra of the current weights: what `llr` and `tempbalance` share."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from esdtool.assignment.assign_options import AssignOptions
from esdtool.assignment.options import Control, LiveScoreName
from esdtool.errors import ConfigError
from esdtool.names import module_name
from esdtool.train.config.section import Strings
from esdtool.train.config.spectral import SpectralKeys
from esdtool.train.learning_rate import LearningRateSettings, ModuleRate, RateRecord
from esdtool.train.parameter_groups import trainable
from esdtool.train.policy import Target, unscored_remark

if TYPE_CHECKING:
    from esdtool.optim.schedule import SpectralSchedule


class SpectralRateSettings(LearningRateSettings, SpectralKeys):
    """Keys of the policies that follow spectra; the published values are the subclasses'."""

    interval: int
    glide: int
    fraction: float
    min_ratio: float
    max_ratio: float
    ends: bool
    delay: Annotated[int, Field(ge=0)] = 0
    """Steps between the measurement of the weights and the first use of the ratios, less than interval; the
    spectra are computed beside the training. 0: within the step, as published."""
    initial: bool = True
    """Look at the initial weights too; false: ratio 1 until the first refresh."""
    compute: Literal["all-ranks", "first-rank"] = "all-ranks"
    """Spread the spectra over the ranks, or leave them to rank 0. Beside alphadecay, whose spectra serve both
    where fit and score are the same, its choice holds."""
    score: LiveScoreName = AssignOptions.score
    """The number that the ratios follow."""
    assign: Literal["linear", "sqrt", "log2", "sigmoid"] = "linear"
    """From scores to ratios; `linear` is the method. The others have mean ratio 1."""
    granularity: Literal["module", "layer", "role"] = "module"
    """Ratio per module (the method), or the same for all modules of a layer or of a role."""
    normalize: bool = False
    """Rescale so that the parameter-weighted mean of the ratios is 1: a fair comparison with uniform."""
    control: Control = "none"
    """What would show that the gain is not the method's. `mean`: each module gets the parameter-weighted mean of the
    method's ratios; `shuffled`: the same ratios, dealt at random (by run.seed); `reversed`: in the opposite order."""
    include: Strings = ()
    """Regular expressions on module names: only these have a ratio of their own; each must match something."""
    exclude: Strings = ()
    """Regular expressions on module names: these have no ratio of their own; each must match something."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.delay >= self.interval and self.delay:
            raise ValueError(
                f"learning_rate.delay {self.delay} is not less than learning_rate.interval {self.interval}"
            )
        if self.min_ratio > self.max_ratio:
            raise ValueError(
                f"learning_rate.min_ratio {self.min_ratio} is more than learning_rate.max_ratio {self.max_ratio}"
            )
        return self

    def start(self, target: Target, share: SpectralSchedule | None) -> SpectralRates:
        """Start the policy on a model and its optimizers."""
        return SpectralRates(self, target, share)

    def rehearse(self, target: Target) -> None:
        """Refuse a model without a weight module to assign."""
        if not target.modules:
            raise ConfigError(
                f'learning_rate.policy = "{self.policy}": the model has no weight module; see include and exclude'
            )


class SpectralRates:
    """`llr` and `tempbalance`: `esdtool.optim.LayerwiseLR` with the settings of [learning_rate]."""

    def __init__(self, settings: SpectralRateSettings, target: Target, share: SpectralSchedule | None) -> None:
        """Look at the initial weights, unless a state will be loaded or `initial = false`.

        Raises:
            ConfigError: if no module is left to assign.
        """
        from esdtool.optim import LayerwiseLR

        settings.rehearse(target)
        is_linear = settings.assign == "linear"
        began = time.perf_counter()
        self._target = target
        self._schedule = LayerwiseLR(
            target.model,
            list(target.optimizers),
            target.steps,
            settings.interval,
            glide=settings.glide,
            fraction=settings.fraction,
            delay=settings.delay,
            min_ratio=settings.min_ratio if is_linear else None,
            max_ratio=settings.max_ratio if is_linear else None,
            fit=settings.score_options(),
            assign=settings.assign,
            score=settings.score,
            granularity=settings.granularity,
            normalize=settings.normalize,
            control=settings.control,
            control_seed=target.seed,
            # Exactly these: the patterns of the configuration speak of module names.
            include=[f"^{re.escape(module.parameter)}$" for module in target.modules],
            ends=settings.ends,
            initial=settings.initial and not target.resuming,
            compute=settings.compute,
            share=share,
        )
        self._seconds = time.perf_counter() - began
        self._delay = settings.delay

    def step(self) -> RateRecord | None:
        """Set the ratios of the next update."""
        began = time.perf_counter()
        schedule = self._schedule
        schedule.step()
        measured = schedule.update_step - self._delay
        if measured <= 0 or not schedule.is_due(measured):
            return None
        return self._record(time.perf_counter() - began)

    def initial(self) -> RateRecord | None:
        """Return the record of the initial ratios."""
        return self._record(self._seconds)

    def mean_ratio(self) -> float:
        """Return the mean ratio in force over all trained parameters."""
        ratios = self._schedule.last_ratios
        sizes = {name: parameter.numel() for name, parameter in trainable(self._target.model).items()}
        return sum(ratios.get(name, 1.0) * size for name, size in sizes.items()) / sum(sizes.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        self._schedule.settle()
        return self._schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self._schedule.load_state_dict(state)

    def _record(self, seconds: float) -> RateRecord:
        schedule = self._schedule
        alphas, scores, notes = schedule.last_alphas, schedule.last_scores, schedule.last_notes
        is_known = any(score is not None for score in scores.values())
        return RateRecord(
            seconds=seconds,
            weights_step=max(0, schedule.update_step - self._delay - 1),
            remark=unscored_remark(notes, len(scores)) if is_known else None,
            modules={
                module_name(name): ModuleRate(
                    ratio=ratio,
                    alpha=alphas.get(name),
                    score=None if scores.get(name) == alphas.get(name) else scores[name],
                )
                for name, ratio in schedule.target_ratios.items()
            },
        )
