"""AlphaDecay (arXiv 2506.14562) as a scheduler: decays that follow the spectra of the weights during training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from esdtool._version import __version__
from esdtool.assignment import Assignment, Default, Entry, Method, Source
from esdtool.decay_rule import DecayRule
from esdtool.errors import AssignmentError, UsageError
from esdtool.fused_decay import joined_roles, members_of, weighted_mean
from esdtool.modules import WeightModule
from esdtool.optim import groups
from esdtool.optim.live_scores import Compute, LiveScore, LiveScoreName, Measure, Ranks, live_scores
from esdtool.optim.managed import manage
from esdtool.optim.parameters import live_model
from esdtool.options import AssignName, Control, Granularity, ScoreOptions, Unlisted
from esdtool.weight_decay import BASE_DECAY

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

    Which: modules of numbered blocks as `select_modules` finds them (attention and MLP; all matrices if there are no
    numbered blocks) that are trained by one of the optimizers. `skipped` names the others. A module that cannot be
    scored at a refresh has the base decay until the next one, and `last_notes` says why. A parameter that holds several
    modules (fused projections, stacked experts) has the mean of their ratios, weighted by size.

    How: with `assign="linear"`, decay_i = base (s1 + (alpha_i - min) / (max - min) (s2 - s1)); see
    `esdtool.decay_rule.decay_ratios`. Works with for-loop, foreach and fused kernels, since all read
    `group["weight_decay"]` at each step. Do not compile `optimizer.step`: it would recompile at every change.

    With torch.distributed each spectrum is computed by one rank and the scores are gathered; construction, `step` at a
    refresh and `refresh` are then collectives. DistributedDataParallel and FSDP2 (`fully_shard`, before the optimizer
    is built) are supported; FSDP1 and ZeRO-3 are refused.

    To resume: build model, optimizer and AlphaDecay as at the start, then load the state of all three.

    Args:
        model: the model, wrapped or not.
        optimizer: one or several, e.g. torch.optim.Muon for matrices and AdamW for the rest.
        weight_decay: base decay. None takes each parameter group's own as its base; a sequence holds one per optimizer.
        interval: updates between two refreshes.
        min_ratio: smallest decay over the base, of `linear`; default 0.67.
        max_ratio: largest decay over the base, of `linear`; default 5, or 3 if the optimizers are of the Adam family
            with the decay as an L2 penalty.
        fit: estimator of alpha, or all options of the spectra; of several fits the first counts.
        assign: formula from scores to decays.
        score: what the decays follow. `gradient_norm` takes `.grad` as it is when `step` is called, after unscaling
            and clipping, and has base decays until the first refresh; with `assign="sigmoid"` it is AdaDecay
            (arXiv 1907.08931) module by module.
        granularity: one decay per `module` (the method), `layer` or `role`.
        normalize: rescale so that the parameter-weighted mean decay over base is 1.
        control: for experiments, `mean`, `shuffled` or `reversed` use of the method's own decays; see
            `esdtool.decay_rule.DecayRule`.
        control_seed: of `shuffled`, which permutation.
        include: regular expressions on parameter names; if given, exactly the matching matrices are assigned.
        exclude: regular expressions on parameter names to leave out.
        unlisted: decay of all other parameters of the model: `keep` what the optimizer says, `no-decay` or `base`.
        initial: assign from the initial weights; False: base until the first refresh.
        split: allow to split parameter groups.
        device: where to compute spectra; default the parameter's own device.
        jobs: spectra at a time on the CPU; default torch's number of threads.
        compute: `all-ranks` spreads the modules over the ranks, `first-rank` leaves them to rank 0, `each-rank` makes
            every process work alone (for processes that train different models).
        process_group: the ranks that share the model; default all.

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
        weight_decay: float | Sequence[float | None] | None = 0.1,
        interval: int = 500,
        *,
        min_ratio: float | None = None,
        max_ratio: float | None = None,
        fit: str | ScoreOptions = "hill",
        assign: AssignName = "linear",
        score: LiveScoreName = "alpha",
        granularity: Granularity = "module",
        normalize: bool = False,
        control: Control = "none",
        control_seed: int = 0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        unlisted: Unlisted = "keep",
        initial: bool = True,
        split: bool = True,
        device: torch.device | str | None = None,
        jobs: int | None = None,
        compute: Compute = "all-ranks",
        process_group: Any = None,
    ) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise UsageError(f"interval must be a whole number of updates, at least 1, not {interval!r}")
        if jobs is not None and jobs < 1:
            raise UsageError(f"jobs must be at least 1, not {jobs}")
        if unlisted not in ("keep", "no-decay", "base"):
            raise UsageError(f"unknown choice for unlisted parameters {unlisted!r}; choose from keep, no-decay, base")
        self.interval = interval
        self.update_step = 0
        """Calls of `step` so far."""
        self._measure = Measure(
            score=score,
            options=fit if isinstance(fit, ScoreOptions) else ScoreOptions(fit=(fit,)),
            device=None if device is None else torch.device(device),
        )
        self._jobs = jobs
        self._ranks = Ranks(compute, process_group)
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
        if initial and not self._measure.reads_gradients:
            self.refresh()
        else:
            self.apply()

    def step(self) -> None:
        """Call once per update, before `optimizer.step()`: renews the decays if it is time, and writes them."""
        self.update_step += 1
        if self.update_step % self.interval == 0:
            self.refresh()
        else:
            self.apply()

    def refresh(self) -> None:
        """Compute the scores of the current weights now, and the decays from them. A collective."""
        parameters = list(self._modules.values())
        modules = [module for held in parameters for module in held]
        weights = [self._managed.parameter(name) for name in self._modules]
        tensors = [weight.grad if self._measure.reads_gradients else weight.detach() for weight in weights]
        found = live_scores(parameters, tensors, self._measure, ranks=self._ranks, jobs=self._jobs)
        scores = [score for held in found for score in held]
        sizes = [math.prod(module.shape) for module in modules]
        ratios = self._rule.ratios(
            [score.value for score in scores],
            layers=[module.layer for module in modules],
            roles=[module.role for module in modules],
            sizes=sizes,
        )
        start = 0
        for (name, held), held_scores in zip(self._modules.items(), found, strict=True):
            part = slice(start, start := start + len(held))
            self._scores[name], self._ratios[name] = _of_parameter(held, held_scores, ratios[part], sizes[part])
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
        """Why a parameter has the base decay instead of one from its score; empty if all were scored."""
        return {name: f"{BASE_DECAY}: {score.status}" for name, score in self._scores.items() if score.status != "ok"}

    def assignment(self) -> Assignment:
        """The decays in force as a wd.json. Where bases differ, `base_weight_decay` is the first module's."""
        rule, measure = self._rule, self._measure
        low, high = rule.ratios_range if rule.assign == "linear" else (None, None)
        base = next(iter(self._bases.values()))
        notes, decays = self.last_notes, self.last_decays
        model_type = self._managed.live.checkpoint.model_type
        return Assignment(
            created_by=f"esdtool {__version__}",
            source=Source(checkpoint="memory", model_type=model_type),
            base_weight_decay=base,
            optimizer="l2" if rule.optimizer == "adam" else "decoupled",
            method=Method(
                name="uniform" if rule.assign == "uniform" else "alphadecay",
                score=measure.score,
                fit=measure.options.fit[0],
                assign=rule.assign,
                min_ratio=low,
                max_ratio=high,
                granularity=rule.granularity,
                normalize=rule.normalize,
                control=rule.control,
            ),
            default=Default.of(self._unlisted, base),
            parameters={
                name: Entry(
                    weight_decay=decays[name],
                    ratio=self._ratios[name],
                    alpha=self._scores[name].alpha,
                    score=None if measure.score == "alpha" else self._scores[name].value,
                    role=joined_roles(module.role for module in held),
                    layer=held[0].layer,
                    shape=held[0].stored_shape,
                    note=notes.get(name),
                )
                for name, held in self._modules.items()
            },
            members={
                name: members
                for name, held in self._modules.items()
                if (members := members_of([module.name for module in held])) is not None
            },
            left_out=dict(self.skipped),
        )

    def state_dict(self) -> dict[str, Any]:
        """Counter, scores and decays, as plain numbers (safe for `torch.load(weights_only=True)`)."""
        return {
            "version": _STATE_VERSION,
            "update_step": self.update_step,
            "alphas": self.last_alphas,
            "scores": self.last_scores,
            "statuses": {name: score.status for name, score in self._scores.items()},
            "ratios": dict(self._ratios),
            "bases": dict(self._bases),
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
        self.apply()


def _of_parameter(
    modules: Sequence[WeightModule], scores: Sequence[LiveScore], ratios: Sequence[float], sizes: Sequence[int]
) -> tuple[LiveScore, float]:
    """(score, ratio) of a parameter from those of its modules."""
    if len(modules) == 1:
        return scores[0], ratios[0]
    ratio = weighted_mean(ratios, sizes)
    assert ratio is not None
    problems = [
        f"{module.name}: {score.status}" for module, score in zip(modules, scores, strict=True) if score.status != "ok"
    ]
    score = LiveScore(
        status="; ".join(problems) or "ok",
        alpha=weighted_mean([score.alpha for score in scores], sizes),
        value=weighted_mean([score.value for score in scores], sizes),
    )
    return score, ratio
