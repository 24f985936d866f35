"""Define weight-decay policies: their settings, their targets, their decisions, and the records of these.

The policies themselves are in `esdtool.train.policies`, one file each. torch is imported where it is used: whoever only
reads a configuration needs none of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from esdtool.assignment.options import OptimizerName, Unlisted
from esdtool.names import module_name
from esdtool.train.config.section import NotNegative, Section, Strings
from esdtool.train.parameter_groups import Group, all_groups, groups_by_parameter, trainable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from esdtool.modules import WeightModule
    from esdtool.optim.schedule import SpectralSchedule


class PolicySettings(Section, ABC):
    """Keys of [weight_decay] that every policy has."""

    policy: str
    """What sets the decay of each parameter."""
    base: NotNegative | Literal["power-lines"] | None = None
    """Base decay, which the policies' decays are multiples of. Default: 0.1 for adamw and muon, 1e-5 for adam, whose L2
    decay is on another scale. `power-lines` (adamw only): predicted from batch, learning rate, tokens and parameters
    by the law of arXiv 2505.13738, for models of 111 million to 3.3 billion parameters."""
    cautious: bool = False
    """Decay a weight only where the update does not push it away from zero (arXiv 2510.12402); with any policy,
    for adamw and muon. Takes the memory of one more copy of the weights while the optimizer steps."""
    include: Strings = ()
    """Regular expressions on module names: only these modules have a decay of their own; each must match something."""
    exclude: Strings = ()
    """Regular expressions on module names: these have no decay of their own; each must match something."""
    unlisted: Literal["keep", "no-decay", "base"] = "keep"
    """Parameters that get no decay of their own (norms, embeddings, lm_head, excluded modules): `keep` what the
    optimizer starts with, which in training is base (as in the paper's code); `base` says the same outright;
    `no-decay`: 0."""

    published_bases: ClassVar[Mapping[OptimizerName, float]] = {"adamw": 0.1, "adam": 1e-5}
    """Base decays of the paper (arXiv 2506.14562)."""
    differs_by_module: ClassVar[bool] = False
    """Whether the policy gives modules decays of their own, so that it matters which modules are left out."""

    @abstractmethod
    def start(self, target: Target) -> Policy:
        """The policy at work on a model.

        Raises:
            ConfigError, AssignmentError, UsageError: if the settings do not fit the model.
        """

    def rehearse(self, target: Target) -> None:
        """Refuse what `start` would refuse, for a model whose parameters hold no numbers (torch's meta device).

        Raises:
            ConfigError, AssignmentError, UsageError: if the settings do not fit the model.
        """

    def defaults(self, optimizer: OptimizerName) -> dict[str, Any]:
        """Values of the unset keys whose default depends on the kind of decay."""
        return {"base": self.published_bases[optimizer]} if self.base is None else {}

    def check(self, optimizer_name: str) -> None:
        """Refuse settings that do not fit the optimizer.

        Raises:
            ValueError: naming the keys.
        """
        if self.cautious and optimizer_name == "adam":
            raise ValueError(
                "weight_decay.cautious needs a decay apart from the gradient, "
                'as optimizer.name "adamw" and "muon" have it, not "adam"'
            )
        if self.base == "power-lines" and optimizer_name != "adamw":
            raise ValueError(f'weight_decay.base "power-lines" is a law of AdamW, not of "{optimizer_name}"')


@dataclass(frozen=True, kw_only=True)
class ModuleDecay:
    """The entry of one module in decay.jsonl."""

    weight_decay: float
    alpha: float | None = None
    """None where the policy does not look at spectra, or the module could not be scored."""
    score: float | None = None
    """What the decay follows, where that is not alpha."""


@dataclass(frozen=True, kw_only=True)
class DecayRecord:
    """One line of decay.jsonl."""

    seconds: float
    """Time that the training waited for the refresh on this rank."""
    weights_step: int | None = None
    """Updates that the measured weights had seen; None if no weights were measured."""
    modules: Mapping[str, ModuleDecay] = field(default_factory=dict)
    """By module name."""
    remark: str | None = None
    """What the user should know of it, e.g. that modules could not be scored."""


class Policy(Protocol):
    """Decides the weight decays of a run, as floats in the optimizers' groups. The same decisions on every rank."""

    def step(self, grad_norm: float) -> DecayRecord | None:
        """Set the decays of an update: after the backward pass, before the optimizer step.

        Args:
            grad_norm: 2-norm of the gradient that the optimizer will use, over all parameters.

        Returns:
            What to log, or None.
        """

    def initial(self) -> DecayRecord | None:
        """Return the record to log before the first step."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, and set the groups' decays again."""


@runtime_checkable
class HasSchedule(Protocol):
    """Mark a policy that follows spectra, which serve other policies too."""

    schedule: SpectralSchedule


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model, the optimizers and the settings on which a policy works."""

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    modules: Sequence[WeightModule]
    """The modules that may have a decay of their own."""
    base_decay: float
    optimizer_name: str
    """optimizer.name."""
    steps: int
    """Updates of the whole run."""
    seed: int
    """Seed of the run."""
    unlisted: Unlisted = "keep"
    """Decay of the parameters that are not in `modules`."""
    resuming: bool = False
    """Whether a saved state will be loaded at once, so that initial spectra need not be computed."""

    @property
    def optimizer(self) -> OptimizerName:
        """The kind of decay: `adam` adds it to the gradient, `adamw` (and Muon) decays apart from it."""
        return kind_of_decay(self.optimizer_name)

    @property
    def never_decaying(self) -> frozenset[int]:
        """`id`s of the parameters that never decay (`unlisted = "no-decay"`)."""
        if self.unlisted != "no-decay":
            return frozenset()
        own = {module.parameter for module in self.modules}
        return frozenset(id(parameter) for name, parameter in trainable(self.model).items() if name not in own)

    def decaying(self) -> list[Group]:
        """The groups that decay at all. Ask again after a state was loaded, which replaces the groups."""
        never = self.never_decaying
        return [group for group in all_groups(self.optimizers) if id(group["params"][0]) not in never]

    def own_groups(self) -> list[tuple[WeightModule, nn.Parameter, Group]]:
        """Each module with its parameter and its group."""
        parameters, groups = trainable(self.model), groups_by_parameter(self.optimizers)
        found = []
        for module in self.modules:
            parameter = parameters.get(module.parameter)
            if parameter is not None:  # frozen ones have no group
                found.append((module, parameter, groups[id(parameter)]))
        return found

    def current_decays(self) -> dict[str, ModuleDecay]:
        """The decays of the modules as the groups have them, by module name."""
        return {
            module.name: ModuleDecay(weight_decay=float(group["weight_decay"]))
            for module, _, group in self.own_groups()
        }


def kind_of_decay(optimizer_name: str) -> OptimizerName:
    """Return how an optimizer of [optimizer] decays weights: as Adam or as AdamW does."""
    return "adam" if optimizer_name == "adam" else "adamw"


def unscored_remark(notes: Mapping[str, str], count: int) -> str | None:
    """Say how many of a schedule's modules have no score, and why the first has none; None if all have one.

    Args:
        notes: `last_notes` of a live schedule.
        count: the modules that it looks at.
    """
    if not notes:
        return None
    name, reason = next(iter(notes.items()))
    return f"{len(notes)} of {count} modules are not scored, e.g. {module_name(name)}: {reason}"
