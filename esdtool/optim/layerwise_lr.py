"""Run layer-wise learning rates (LLR, arXiv 2605.22297) and TempBalance as a scheduler beside any other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from esdtool.assignment.allocation import Allocation
from esdtool.assignment.assign_options import AssignOptions
from esdtool.assignment.learning_rate_maps import LLR_RATIOS
from esdtool.assignment.options import AssignName, Control, Granularity, LiveScoreName
from esdtool.assignment.rule import DecayRule
from esdtool.errors import UsageError
from esdtool.optim import groups
from esdtool.optim.learning_rates import ScaledRates
from esdtool.optim.live_decays import live_ratios
from esdtool.optim.live_rates import live_rates
from esdtool.optim.live_scores import LiveScore, Measure
from esdtool.optim.schedule import SpectralSchedule
from esdtool.optim.shared_scores import Compute
from esdtool.spectra.options import ScoreOptions


class LayerwiseLR(SpectralSchedule):
    """Set module-wise learning rates from the heavy tails of the weights, as multiples of what the scheduler says.

    A module with a lighter tail (larger alpha) has learned less and gets a larger rate. Build it after the optimizer
    and before the learning-rate scheduler (it splits parameter groups, which schedulers count), and step it once per
    update, *before* the optimizer:

        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
        layerwise_lr = LayerwiseLR(model, optimizer, num_updates)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_updates)
        for batch in batches:
            loss(model, batch).backward()
            layerwise_lr.step()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    How: ratio_i = s1 + (alpha_i - min) / (max - min) (s2 - s1) with `assign="linear"`, s1 = `min_ratio` and
    s2 = `max_ratio`, and module i steps with ratio_i times the rate of its group at that step. The ratio stands in
    `group["lr"]` only while the optimizer steps (a hook multiplies before and restores after), so it survives every
    scheduler, recursive ones included, never compounds, and is in no checkpoint of the optimizer. `last_rates` tells
    what the modules step with.

    Which: the modules that `AlphaDecay` would assign, and with `ends` the token embedding and the output head, which
    take the ratio of the largest alpha. Norms and all else keep the scheduler's rate. With several optimizers (Muon for
    matrices, AdamW for the rest) each ratio multiplies the rate of the optimizer that holds the parameter.

    When: on construction from the initial weights, and in every call of `step` whose number is a multiple of
    `interval`, up to the fraction `fraction` of `num_updates`; then the last ratios stay. New ratios are not jumped to:
    the ratio in force goes there in a straight line over `glide` updates, the first of which is the one that looked.

    The published settings are the defaults, except that the paper's code draws its line between learning rates, to
    where the schedule will be at the end of it; between ratios it is the same where the schedule is constant. The mean
    rate rises above the scheduler's, so compare also with `control="mean"`, or `normalize`.

    TempBalance (arXiv 2312.00359) is `min_ratio=0.5, max_ratio=1.5, fraction=1, glide=0, ends=False`.

    `delay`, torch.distributed, sharded models, resuming and `share` are as for `AlphaDecay`. Optimizers whose rate is a
    tensor (capturable) work; a CUDA graph of the step, once captured, does not see other rates. Schedule-free
    optimizers work, in `train()` mode when `step` is called; they average with weights that follow each group's largest
    rate so far. Optimizers that find their own rate (Prodigy, D-Adaptation) allow one for all groups and are refused.

    Args:
        model: the model, wrapped or not.
        optimizer: one or several.
        num_updates: updates of the whole run; needed unless `fraction` is 1.
        interval: updates between two looks at the spectra.
        glide: updates over which new ratios come into force; 0 or 1: at once.
        fraction: part of the run after which the ratios stay, above 0 and at most 1.
        delay: updates between a snapshot and the first use of its ratios, less than `interval`.
        min_ratio: smallest rate over the scheduler's, of `linear`; default 1.
        max_ratio: largest rate over the scheduler's, of `linear`; default 5.
        fit: estimator of alpha, or all options of the spectra; of several fits the first counts.
        assign: formula from scores to ratios.
        score: what the ratios follow, as for `AlphaDecay`.
        granularity: one ratio per `module` (the method), `layer` or `role`.
        normalize: rescale, after the control, so that the parameter-weighted mean ratio is 1.
        control: for experiments, `mean`, `shuffled` or `reversed` use of the method's own ratios.
        control_seed: which permutation `shuffled` takes.
        include: regular expressions on parameter names; if given, exactly the matching matrices are assigned.
        exclude: regular expressions on parameter names to leave out.
        ends: give the token embedding and the output head the ratio of the largest score.
        initial: look at the initial weights; False: ratio 1 until the first refresh.
        split: allow to split parameter groups.
        device: where to compute spectra; default the parameter's own device.
        jobs: spectra at a time on the CPU.
        compute: who computes, as for `AlphaDecay`.
        process_group: the ranks that share the model; default all.
        share: an `AlphaDecay` of the same model, with the same `fit` and `score`: where both look at the weights of the
            same update, each spectrum is computed once. Its `jobs`, `compute` and `process_group` hold.

    Raises:
        UsageError: for an option without such a value or a pattern that matches nothing.
        AssignmentError: if the optimizer does not fit: it holds none of the model's parameters, allows no learning
            rates per group, or its groups would have to be split and must not be.
        NothingToAnalyzeError: if no module is left to assign.
    """

    name = "LayerwiseLR"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        num_updates: int | None = None,
        interval: int = 100,
        *,
        glide: int = 50,
        fraction: float = 0.2,
        delay: int = 0,
        min_ratio: float | None = None,
        max_ratio: float | None = None,
        fit: str | ScoreOptions = ScoreOptions.fit[0],
        assign: AssignName = DecayRule.assign,
        score: LiveScoreName = AssignOptions.score,
        granularity: Granularity = DecayRule.granularity,
        normalize: bool = DecayRule.normalize,
        control: Control = DecayRule.control,
        control_seed: int = DecayRule.control_seed,
        include: Sequence[str] = AssignOptions.include,
        exclude: Sequence[str] = AssignOptions.exclude,
        ends: bool = True,
        initial: bool = True,
        split: bool = True,
        device: torch.device | str | None = None,
        jobs: int | None = None,
        compute: Compute = "all-ranks",
        process_group: Any = None,
        share: SpectralSchedule | None = None,
    ) -> None:
        groups.check_order(model, optimizer, f"{self.name}(model, optimizer)")
        self._glide = _whole(glide, "glide", least=0)
        if isinstance(fraction, bool) or not 0 < fraction <= 1:
            raise UsageError(f"fraction must be above 0 and at most 1, not {fraction!r}")
        self._fraction = float(fraction)
        self.num_updates = num_updates
        self._rule = _rule(
            assign,
            min_ratio,
            max_ratio,
            granularity=granularity,
            normalize=normalize,
            control=control,
            control_seed=control_seed,
        )
        super().__init__(
            model,
            optimizer,
            interval=interval,
            delay=delay,
            measure=Measure.of(score, fit, device),
            include=include,
            exclude=exclude,
            jobs=jobs,
            compute=compute,
            process_group=process_group,
            share=share,
        )
        managed = self._managed
        self._ends = managed.ends if ends else ()
        names = [*self._modules, *self._ends]
        self._start = dict.fromkeys(names, 1.0)
        """Ratios at the beginning of the line to the targets."""
        self._targets = dict.fromkeys(names, 1.0)
        self._since = 1
        """The update in which the line to the targets began."""
        self._rates = ScaledRates(managed.optimizers, by=self.name)
        try:
            managed.split_groups(
                {managed.parameter(name): name for name in self._ends}, allowed=split, values="learning rates"
            )
            if initial and not self._measure.reads_gradients:
                self.refresh()
            else:
                self.apply()
        except BaseException:
            self._rates.remove()
            raise

    @property
    def num_updates(self) -> int | None:
        """Updates of the whole run. A trainer that learns of it late may set it before the first step."""
        return self._num_updates

    @num_updates.setter
    def num_updates(self, value: int | None) -> None:
        if value is None:
            if self._fraction < 1:
                raise UsageError(
                    "num_updates is needed: the ratios stay as they are after a fraction of the run; "
                    "or give fraction=1 to renew them to the end"
                )
            self._num_updates = None
        else:
            self._num_updates = _whole(value, "num_updates", least=1)

    def is_due(self, update_step: int) -> bool:
        """Tell whether the spectra are looked at in the `update_step`-th call of `step`."""
        is_early = self._num_updates is None or update_step <= self._fraction * self._num_updates
        return is_early and super().is_due(update_step)

    def _take(self, found: Sequence[Sequence[LiveScore]]) -> None:
        # The update that looks is the first on the new line.
        before = self._ratios_at(self.update_step - 1)
        sizes = [self._managed.parameter(name).numel() for name in self._ends]
        scores, ratios = live_ratios(self._rule, self._modules, found, ends=dict(zip(self._ends, sizes, strict=True)))
        for name, ratio in ratios.items():
            if not math.isfinite(ratio):
                raise UsageError(f"{name}: the learning-rate ratio {ratio:g} is not a finite number")
        self._scores, self._start, self._targets = scores, before, ratios
        self._since = max(1, self.update_step)

    def restart(self) -> None:
        """Begin again at the weights as they are, as if no update had been made yet. A collective."""
        self._start = self._targets = dict.fromkeys(self._targets, 1.0)
        super().restart()

    def apply(self) -> None:
        """Hand the ratios in force to the optimizers, e.g. after `optimizer.load_state_dict`.

        Raises:
            AssignmentError: if groups were merged since construction.
        """
        self._managed.check_held(self._targets)
        ratios = {self._managed.parameter(name): ratio for name, ratio in self.last_ratios.items()}
        self._rates.set(ratios.get)

    def close(self) -> None:
        """Leave the optimizers alone: their next steps take the scheduler's rates."""
        super().close()
        self._rates.remove()

    @property
    def last_ratios(self) -> dict[str, float]:
        """The learning rate in force of each assigned parameter, over the scheduler's."""
        return self._ratios_at(self.update_step)

    def _ratios_at(self, update_step: int) -> dict[str, float]:
        """Compute the ratios of an update on the present line or before it."""
        done = update_step - self._since + 1
        if self._glide <= 1 or done >= self._glide:
            return dict(self._targets)
        position = max(0, done) / self._glide
        # Equal ends are the ratio itself, to the last bit.
        return {
            name: target if target == self._start[name] else (1.0 - position) * self._start[name] + position * target
            for name, target in self._targets.items()
        }

    @property
    def target_ratios(self) -> dict[str, float]:
        """The ratios that the last look at the spectra asks for, which `last_ratios` reaches after `glide` updates."""
        return dict(self._targets)

    @property
    def last_rates(self) -> dict[str, float]:
        """The learning rate with which each assigned parameter steps now: its ratio times the scheduler's rate."""
        groups_of = {
            parameter: group
            for optimizer in self._managed.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        return {name: self._rates.rate(groups_of[self._managed.parameter(name)]) for name in self._targets}

    @property
    def _values(self) -> Mapping[str, Mapping[str, float]]:
        return {"lr_ratio": self.last_ratios}

    @property
    def last_notes(self) -> dict[str, str]:
        """Why modules could not be scored, so that their ratio is 1; empty if all were scored."""
        return {name: f"ratio 1: {score.status}" for name, score in self._scores.items() if score.value is None}

    def assignment(self) -> Allocation:
        """Return the ratios that the last look asks for as an assignment of version 2."""
        return live_rates(
            self._modules,
            self._scores,
            self._targets,
            ends={name: tuple(self._managed.parameter(name).shape) for name in self._ends},
            rule=self._rule,
            measure=self._measure,
            model_type=self._managed.live.checkpoint.model_type,
            left_out=self.skipped,
        )

    def state_dict(self) -> dict[str, Any]:
        """Counter, scores and ratios, as plain numbers (safe for `torch.load(weights_only=True)`).

        A refresh under way is waited for and saved too.

        Raises:
            RuntimeError: if there is one and several ranks share it, and `settle` was not called on all of them.
        """
        return self._state() | {"ratios": dict(self._targets), "start": dict(self._start), "since": self._since}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the counter and the ratios of `state_dict`, in the middle of a line if need be.

        Options (`interval`, `num_updates`, ...) stay as constructed.

        Raises:
            AssignmentError: if the state is of another version or of other modules.
        """
        self._check_state(state_dict, list(self._targets))
        self._targets = {name: float(state_dict["ratios"][name]) for name in self._targets}
        self._start = {name: float(state_dict["start"][name]) for name in self._targets}
        self._since = int(state_dict["since"])
        self._load(state_dict)
        self.apply()


def _rule(assign: AssignName, low: float | None, high: float | None, **options: Any) -> DecayRule:
    """Make the rule, with the published ratios of LLR for `linear`."""
    if assign == "linear":
        low = LLR_RATIOS[0] if low is None else low
        high = LLR_RATIOS[1] if high is None else high
    return DecayRule(assign=assign, min_ratio=low, max_ratio=high, **options)


def _whole(value: Any, name: str, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} must be a whole number of updates, at least {least}, not {value!r}")
    return value
