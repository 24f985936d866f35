"""AlphaDecay (arXiv 2506.14562) as a scheduler: decays that follow the spectra of the weights during training."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from esdtool.assignment.assign_options import AssignOptions
from esdtool.assignment.document import Assignment
from esdtool.assignment.options import AssignName, Control, Granularity, LiveScoreName, Unlisted, check_unlisted
from esdtool.assignment.rule import DecayRule
from esdtool.errors import AssignmentError, UsageError
from esdtool.modules import WeightModule
from esdtool.optim import groups
from esdtool.optim.live_decays import live_assignment, live_decays, live_note
from esdtool.optim.live_scores import LiveScore, Measure, Operands
from esdtool.optim.managed import manage
from esdtool.optim.parameters import live_model
from esdtool.optim.pending import PendingScores
from esdtool.optim.shared_scores import Compute, LiveRanks, live_scores
from esdtool.spectra.options import ScoreOptions

_LOG = logging.getLogger(__name__)

_STATE_VERSION = 1


class AlphaDecay:
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

    The logger says how many weight modules their names leave out, as a warning where more than a tenth of them lie
    outside the blocks.

    Raises:
        UsageError: for an option without such a value or a pattern that matches nothing.
        AssignmentError: if the optimizer does not fit: it holds none of the model's parameters, has no weight decay, or
            its groups would have to be split and must not be.
        NothingToAnalyzeError: if no module is left to assign.
    """

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
    ) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise UsageError(f"interval must be a whole number of updates, at least 1, not {interval!r}")
        if isinstance(delay, bool) or not isinstance(delay, int) or not 0 <= delay < interval:
            raise UsageError(f"delay must be a whole number of updates, less than interval {interval}, not {delay!r}")
        if jobs is not None and jobs < 1:
            raise UsageError(f"jobs must be at least 1, not {jobs}")
        check_unlisted(unlisted)
        self.interval = interval
        self.delay = delay
        self.update_step = 0
        """Calls of `step` so far."""
        self._measure = Measure(
            score=score,
            options=fit if isinstance(fit, ScoreOptions) else ScoreOptions(fit=(fit,)),
            device=None if device is None else torch.device(device),
        )
        self._jobs = jobs
        self._ranks = LiveRanks(compute, process_group)
        self._unlisted: Unlisted = unlisted
        self._managed = manage(
            live_model(model),
            groups.as_optimizers(optimizer),
            weight_decay,
            include=include,
            exclude=exclude,
            unlisted=unlisted,
        )
        self.skipped: Mapping[str, str] = self._managed.skipped
        """Matrices that are not assigned although they could be scored, each with the reason."""
        remark = self._managed.scope.remark
        if remark is not None:
            level = logging.WARNING if self._managed.scope.is_surprising else logging.INFO
            _LOG.log(level, "AlphaDecay: %s", remark)
        self._modules: Mapping[str, tuple[WeightModule, ...]] = self._managed.modules
        self._bases: Mapping[str, float] = self._managed.bases
        self._ranks.check_same(list(self._modules))
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
        self._managed.split_groups(allowed=split)

        self._scores = {name: LiveScore(status="not computed yet") for name in self._modules}
        self._ratios = dict.fromkeys(self._modules, 1.0)
        self._pending: PendingScores | None = None
        self._late: list[list[LiveScore]] | None = None
        """Scores that wait for their step: of `_pending`, or of a loaded state."""
        if initial and not self._measure.reads_gradients:
            self.refresh()
        else:
            self.apply()

    def step(self) -> None:
        """Call once per update, before `optimizer.step()`: renews the decays if it is time, and writes them."""
        self.update_step += 1
        if self.delay and self.update_step % self.interval == self.delay and self.is_pending:
            self.settle()
            assert self._late is not None
            self._follow(self._late)
        elif self.update_step % self.interval:
            self.apply()
        elif self.delay:
            self._drop()
            self._pending = PendingScores(*self._measured(), self._measure, ranks=self._ranks, jobs=self._jobs)
            self.apply()
        else:
            self.refresh()

    def refresh(self) -> None:
        """Compute the scores of the current weights now, and the decays from them. A collective.

        A refresh under way beside the training is dropped.
        """
        self._follow(live_scores(*self._measured(), self._measure, ranks=self._ranks, jobs=self._jobs))

    @property
    def is_pending(self) -> bool:
        """Whether decays are under way: a snapshot was taken, and the step that puts its decays in force is to come."""
        return self._pending is not None or self._late is not None

    def settle(self) -> None:
        """Wait for the spectra under way, if any. A collective then. Their decays still wait for their step.

        Raises:
            RuntimeError: on every rank, if the computation failed on one.
        """
        if self._pending is not None:
            try:
                self._late = self._pending.settle()
            finally:
                self._pending = None

    def _drop(self) -> None:
        if self._pending is not None:
            self._pending.drop()
        self._pending = self._late = None

    def _measured(self) -> tuple[list[tuple[WeightModule, ...]], list[Operands]]:
        """List the modules of each parameter, and what is measured of it."""
        operands = [self._measure.operands(self._managed.parameter(name)) for name in self._modules]
        return list(self._modules.values()), operands

    def _follow(self, found: Sequence[Sequence[LiveScore]]) -> None:
        """Put the decays of these scores in force."""
        self._drop()
        scores, ratios = live_decays(self._rule, self._modules, found)
        for name, ratio in ratios.items():
            if not math.isfinite(self._bases[name] * ratio):
                raise UsageError(f"{name}: weight_decay {self._bases[name]:g} times {ratio:g} is not a finite number")
        self._scores, self._ratios = scores, ratios
        self.apply()

    def apply(self) -> None:
        """Write the decays in force to the optimizers' groups again, e.g. after `optimizer.load_state_dict`.

        Raises:
            AssignmentError: if groups were merged since construction.
        """
        self._managed.write(self.last_decays)

    @property
    def last_alphas(self) -> dict[str, float | None]:
        """Alpha of each assigned parameter at the last refresh; None where there is none."""
        return {name: score.alpha for name, score in self._scores.items()}

    @property
    def last_scores(self) -> dict[str, float | None]:
        """What the decays follow, of each assigned parameter at the last refresh: alpha itself unless chosen else."""
        return {name: score.value for name, score in self._scores.items()}

    @property
    def last_decays(self) -> dict[str, float]:
        """The decay in force of each assigned parameter."""
        return {name: self._bases[name] * ratio for name, ratio in self._ratios.items()}

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
        if self._pending is not None and self._ranks.size > 1:
            raise RuntimeError("a refresh is under way: call AlphaDecay.settle() on every rank before state_dict()")
        self.settle()
        return {
            "version": _STATE_VERSION,
            "update_step": self.update_step,
            "alphas": self.last_alphas,
            "scores": self.last_scores,
            "statuses": {name: score.status for name, score in self._scores.items()},
            "ratios": dict(self._ratios),
            "bases": dict(self._bases),
            "late": self._late
            and [[[score.status, score.alpha, score.value] for score in held] for held in self._late],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the counter, the bases and the decays of `state_dict`, and write them to the optimizers.

        Options (`interval`, ratios, ...) stay as constructed. The order of this and `optimizer.load_state_dict` does
        not matter: the next `step` writes the decays again.

        Raises:
            AssignmentError: if the state is of another version or of other modules.
        """
        version = state_dict.get("version")
        if version != _STATE_VERSION:
            raise AssignmentError(
                f"AlphaDecay state of version {version!r} is not supported (this is {_STATE_VERSION})"
            )
        ratios: Mapping[str, float] = state_dict["ratios"]
        if ratios.keys() != self._modules.keys():
            name = min(ratios.keys() ^ self._modules.keys())
            where = "the state but not the model" if name in ratios else "the model but not the state"
            raise AssignmentError(f"the AlphaDecay state is of other modules: {name} is in {where}")
        self.update_step = int(state_dict["update_step"])
        self._ratios = {name: float(ratios[name]) for name in self._modules}
        self._bases = {name: float(state_dict["bases"][name]) for name in self._modules}
        self._scores = {
            name: LiveScore(
                status=state_dict["statuses"][name],
                alpha=state_dict["alphas"][name],
                value=state_dict["scores"][name],
            )
            for name in self._modules
        }
        self._drop()
        late = state_dict.get("late")
        if late and self.delay:
            self._late = [[LiveScore(status=s, alpha=alpha, value=value) for s, alpha, value in held] for held in late]
        self.apply()
