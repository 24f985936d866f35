"""AlphaDecay (arXiv 2506.14562) as a scheduler: decays that follow the spectra of the weights during training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from esdtool.assignment.assign_options import AssignOptions
from esdtool.assignment.document import Assignment
from esdtool.assignment.options import (
    AssignName,
    Control,
    Granularity,
    LiveScoreName,
    Unlisted,
    check_base,
    check_unlisted,
)
from esdtool.assignment.rule import DecayRule
from esdtool.errors import UsageError
from esdtool.optim import groups
from esdtool.optim.live_decays import live_assignment, live_note, live_ratios
from esdtool.optim.live_scores import LiveScore, Measure
from esdtool.optim.managed import Managed
from esdtool.optim.schedule import SpectralSchedule
from esdtool.optim.shared_scores import Compute
from esdtool.spectra.options import ScoreOptions


class AlphaDecay(SpectralSchedule):
    """Module-wise weight decay from the heavy tails of the weights, renewed every `interval` updates.

    A scheduler like those of `torch.optim.lr_scheduler`, to be built after the optimizer and before any of them
    (it splits parameter groups, which they count), and to be stepped once per update, *before* the optimizer:

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        alpha_decay = AlphaDecay(model, optimizer, weight_decay=0.1, interval=500)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_updates)
        for batch in batches:
            loss(model, batch).backward()
            alpha_decay.step()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    When: the alphas of the initial weights set the first decays, on construction. The n-th call of `step`
    (n = 1, 2, ...) renews them if n is a multiple of `interval`, from the weights after n - 1 updates, so that the
    n-th update is the first to use them. That is the published rule, `(update_step + 1) % interval == 0` just before
    the optimizer's step, where `update_step` counts finished updates. Count updates, not micro-batches.

    With `delay` N the n-th call only takes a snapshot of the weights, their spectra are computed by threads beside the
    training steps, and call n + N puts the decays in force on every rank, waiting if it must: the critical path is
    shorter by most of a refresh, the decays are those of N updates ago, and runs are as reproducible as without.

    Which: modules of numbered blocks as `select_modules` finds them (attention and MLP; all matrices if there are no
    numbered blocks) that are trained by one of the optimizers. `skipped` names the others. A module that cannot be
    scored at a refresh has the base decay until the next one, and `last_notes` says why. A parameter that holds several
    modules (fused projections, stacked experts) has the mean of their ratios, weighted by size.

    How: with `assign="linear"`, decay_i = base (s1 + (alpha_i - min) / (max - min) (s2 - s1)); see
    `esdtool.assignment.rule.decay_ratios`. Works with for-loop, foreach and fused kernels, since all read
    `group["weight_decay"]` at each step. Do not compile `optimizer.step`: it would recompile at every change.

    With torch.distributed each spectrum is computed by one rank and the scores are gathered; construction, `step` at a
    refresh (with a delay: at both its ends), `refresh` and `settle` are then collectives. DistributedDataParallel and
    FSDP2 (`fully_shard`, before the optimizer is built) are supported; FSDP1 and ZeRO-3 are refused.

    To resume: build model, optimizer and AlphaDecay as at the start, then load the state of all three.

    Args:
        model: the model, wrapped or not.
        optimizer: one or several, e.g. torch.optim.Muon for matrices and AdamW for the rest.
        weight_decay: base decay. None takes each parameter group's own as its base; a sequence holds one per optimizer.
        interval: updates between two refreshes.
        delay: updates between a snapshot and the first use of its decays, less than `interval`; 0 computes the spectra
            in `step`, as published. The initial decays are never late.
        min_ratio: smallest decay over the base, of `linear`; default 0.67.
        max_ratio: largest decay over the base, of `linear`; default 5, or 3 if the optimizers are of the Adam family
            with the decay as an L2 penalty.
        fit: estimator of alpha, or all options of the spectra; of several fits the first counts.
        assign: formula from scores to decays.
        score: what the decays follow. `gradient_norm` takes `.grad` as it is when `step` is called, after unscaling
            and clipping, and has base decays until the first refresh; with `assign="sigmoid"` it is AdaDecay
            (arXiv 1907.08931) module by module. `gradient_over_weight_norm` divides it by the norm of the weights,
            `gradient_norm_over_lambda_max` by the largest eigenvalue of W^T W, as the public code does.
        granularity: one decay per `module` (the method), `layer` or `role`.
        normalize: rescale, after the control, so that the parameter-weighted mean decay over base is 1.
        control: for experiments, `mean`, `shuffled` or `reversed` use of the method's own decays; see
            `esdtool.assignment.rule.DecayRule`.
        control_seed: which permutation `shuffled` takes.
        include: regular expressions on parameter names; if given, exactly the matching matrices are assigned.
        exclude: regular expressions on parameter names to leave out.
        unlisted: decay of all other parameters of the model: `keep` what the optimizer says, `no-decay` or `base`.
        initial: assign from the initial weights; False: base until the first refresh.
        split: allow to split parameter groups.
        device: where to compute spectra; default the parameter's own device.
        jobs: spectra at a time on the CPU; default torch's number of threads, or with a delay 1 if the CPU also trains.
        compute: `all-ranks` spreads the modules over the ranks, `first-rank` leaves them to rank 0, `each-rank` makes
            every process work alone (for processes that train different models).
        process_group: the ranks that share the model; default all.
        share: another schedule of the same model, with the same `fit` and `score`, stepped beside this one: where both
            look at the weights of the same update, each spectrum is computed once. Its `jobs`, `compute` and
            `process_group` hold.

    The logger says how many weight modules their names leave out, as a warning where more than a tenth of them lie
    outside the blocks.

    Raises:
        UsageError: for an option without such a value or a pattern that matches nothing.
        AssignmentError: if the optimizer does not fit: it holds none of the model's parameters, has no weight decay, or
            its groups would have to be split and must not be.
        NothingToAnalyzeError: if no module is left to assign.
    """

    name = "AlphaDecay"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        weight_decay: float | Sequence[float | None] | None = AssignOptions.weight_decay,
        interval: int = 500,
        *,
        delay: int = 0,
        min_ratio: float | None = DecayRule.min_ratio,
        max_ratio: float | None = DecayRule.max_ratio,
        fit: str | ScoreOptions = ScoreOptions.fit[0],
        assign: AssignName = DecayRule.assign,
        score: LiveScoreName = AssignOptions.score,
        granularity: Granularity = DecayRule.granularity,
        normalize: bool = DecayRule.normalize,
        control: Control = DecayRule.control,
        control_seed: int = DecayRule.control_seed,
        include: Sequence[str] = AssignOptions.include,
        exclude: Sequence[str] = AssignOptions.exclude,
        unlisted: Unlisted = AssignOptions.unlisted,
        initial: bool = True,
        split: bool = True,
        device: torch.device | str | None = None,
        jobs: int | None = None,
        compute: Compute = "all-ranks",
        process_group: Any = None,
        share: SpectralSchedule | None = None,
    ) -> None:
        check_unlisted(unlisted)
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
        self._unlisted: Unlisted = unlisted
        bases = _bases(self._managed.optimizers, weight_decay)
        self._bases: Mapping[str, float] = {name: bases[self._managed.parameter(name)] for name in self._modules}
        self._others = _others(self._managed, unlisted, bases)
        self._rule = DecayRule(
            assign=assign,
            min_ratio=min_ratio,
            max_ratio=max_ratio,
            optimizer=self._managed.kind_of_decay(needed=assign == "linear" and max_ratio is None),
            granularity=granularity,
            normalize=normalize,
            control=control,
            control_seed=control_seed,
        )
        self._managed.split_groups(self._others, allowed=split, values="decays")
        self._ratios = dict.fromkeys(self._modules, 1.0)
        if initial and not self._measure.reads_gradients:
            self.refresh()
        else:
            self.apply()

    def _take(self, found: Sequence[Sequence[LiveScore]]) -> None:
        scores, ratios = live_ratios(self._rule, self._modules, found)
        for name, ratio in ratios.items():
            if not math.isfinite(self._bases[name] * ratio):
                raise UsageError(f"{name}: weight_decay {self._bases[name]:g} times {ratio:g} is not a finite number")
        self._scores, self._ratios = scores, ratios

    def apply(self) -> None:
        """Write the decays in force to the optimizers' groups again, e.g. after `optimizer.load_state_dict`.

        Raises:
            AssignmentError: if groups were merged since construction.
        """
        managed = self._managed
        managed.check_held(self._modules)
        values = {managed.parameter(name): decay for name, decay in self.last_decays.items()} | dict(self._others)
        for optimizer in managed.optimizers:
            groups.set_decays(optimizer, values.get)

    @property
    def last_decays(self) -> dict[str, float]:
        """The decay in force of each assigned parameter."""
        return {name: self._bases[name] * ratio for name, ratio in self._ratios.items()}

    @property
    def _values(self) -> Mapping[str, Mapping[str, float]]:
        return {"weight_decay": self.last_decays}

    @property
    def last_notes(self) -> dict[str, str]:
        """Why parameters do not follow the scores of all of their modules; empty if all were scored."""
        decays = self.last_decays
        notes = {
            name: live_note(score, weight_decay=decays[name], base=self._bases[name])
            for name, score in self._scores.items()
        }
        return {name: note for name, note in notes.items() if note is not None}

    def assignment(self) -> Assignment:
        """Return the decays in force as a wd.json. Where bases differ, `base_weight_decay` is the first module's."""
        return live_assignment(
            self._modules,
            self._scores,
            self._ratios,
            self._bases,
            rule=self._rule,
            measure=self._measure,
            unlisted=self._unlisted,
            model_type=self._managed.live.checkpoint.model_type,
            notes=self.last_notes,
            left_out=self.skipped,
        )

    def state_dict(self) -> dict[str, Any]:
        """Counter, scores and decays, as plain numbers (safe for `torch.load(weights_only=True)`).

        A refresh under way is waited for and saved too.

        Raises:
            RuntimeError: if there is one and several ranks share it, and `settle` was not called on all of them.
        """
        return self._state() | {"ratios": dict(self._ratios), "bases": dict(self._bases)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the counter, the bases and the decays of `state_dict`, and write them to the optimizers.

        Options (`interval`, ratios, ...) stay as constructed. The order of this and `optimizer.load_state_dict` does
        not matter: the next `step` writes the decays again.

        Raises:
            AssignmentError: if the state is of another version or of other modules.
        """
        self._check_state(state_dict, list(self._modules))
        self._ratios = {name: float(state_dict["ratios"][name]) for name in self._modules}
        self._bases = {name: float(state_dict["bases"][name]) for name in self._modules}
        self._load(state_dict)
        self.apply()


def _others(managed: Managed, unlisted: Unlisted, bases: Mapping[nn.Parameter, float]) -> dict[nn.Parameter, float]:
    """Find the decays of the optimized parameters of the model that are no modules; none if they keep theirs."""
    if unlisted == "keep":
        return {}
    mine = {managed.parameter(name) for name in managed.modules}
    others = [parameter for parameter in bases if parameter in managed.live.names and parameter not in mine]
    return {parameter: 0.0 if unlisted == "no-decay" else bases[parameter] for parameter in others}


def _bases(
    optimizers: Sequence[Optimizer], weight_decay: float | Sequence[float | None] | None
) -> dict[nn.Parameter, float]:
    """Find the base decay of every optimized parameter."""
    given = list(weight_decay) if isinstance(weight_decay, Sequence) else [weight_decay] * len(optimizers)
    if len(given) != len(optimizers):
        raise UsageError(f"{len(given)} base weight decays for {len(optimizers)} optimizers")
    bases: dict[nn.Parameter, float] = {}
    for optimizer, base in zip(optimizers, given, strict=True):
        for group in optimizer.param_groups:
            value = group.get("weight_decay", 0.0) if base is None else base
            check_base(value, "weight_decay")
            bases |= dict.fromkeys(group["params"], float(value))
    return bases
