"""Weight-decay policies: what sets the decay of each parameter group, step by step.

All of them write Python floats into the optimizers' `param_groups`, before the optimizer step.
The formulas are in `esdtool.decay_rule`, the spectra in `esdtool.optim.AlphaDecay`: here are
only the rules that belong to training alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from esdtool.decay_rule import decay_ratios
from esdtool.errors import ConfigError
from esdtool.modules import WeightModule
from esdtool.train.optimizers import Group, all_groups, groups_by_parameter, trainable
from esdtool.train.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Decay:
    """What decay.jsonl says of one module."""

    weight_decay: float
    alpha: float | None = None
    """None where the policy does not look at spectra, or the module could not be scored."""
    score: float | None = None
    """What the decay follows, where that is not alpha."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of decay.jsonl."""

    seconds: float
    """Time that the training waited for the refresh on this rank."""
    weights_step: int | None = None
    """Updates that the measured weights had seen; None if no weights were measured."""
    modules: Mapping[str, Decay] = field(default_factory=dict)
    """By module name."""
    remark: str | None = None
    """What the user should know of it, e.g. that modules could not be scored."""


class Policy(Protocol):
    """Decides the weight decays of a run. The same decisions on every rank."""

    def step(self, grad_norm: float) -> Record | None:
        """Once per update, after the backward pass and before the optimizer step.

        Args:
            grad_norm: 2-norm of the gradient that the optimizer will use, over all parameters.

        Returns:
            What to log, or None.
        """

    def initial(self) -> Record | None:
        """What to log before the first step."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, and set the groups' decays again."""


@dataclass(kw_only=True)
class Target:
    """What a policy works on."""

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    modules: Sequence[WeightModule]
    """The modules that may have a decay of their own."""
    config: TrainConfig

    @property
    def keeps_none(self) -> frozenset[int]:
        """`id`s of the parameters that never decay (`unlisted = "no-decay"`)."""
        if self.config.weight_decay.unlisted != "no-decay":
            return frozenset()
        parameters = trainable(self.model)
        own = {module.parameter for module in self.modules}
        return frozenset(id(parameter) for name, parameter in parameters.items() if name not in own)

    def decaying(self) -> list[Group]:
        """The groups that decay at all. Asked for anew: loading a state replaces the groups."""
        never = self.keeps_none
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


class Constant:
    """`uniform` and `none`: one value everywhere, for the whole run."""

    def __init__(self, target: Target, value: float) -> None:
        self._target, self._value = target, value
        self._apply()

    def _apply(self) -> None:
        for group in self._target.decaying():
            group["weight_decay"] = self._value

    def step(self, grad_norm: float) -> Record | None:
        """See `Policy`."""
        del grad_norm
        return None

    def initial(self) -> Record | None:
        """See `Policy`."""
        return Record(seconds=0.0, modules=_current(self._target))

    def state_dict(self) -> dict[str, Any]:
        """See `Policy`."""
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Policy`."""
        del state  # the value is the configuration's
        self._apply()


class Awd:
    """Adaptive weight decay (Ghiasi et al. 2023, arXiv 2210.00094): one global value, from gradient and weights.

    lambda_t = c ||grad||_2 / ||w||_2 over all parameters, c = awd_scale * base; used is the running
    mean bar_t = (1 - s) bar_{t-1} + s lambda_t with bar_0 = 0 and s = awd_smoothing.
    """

    def __init__(self, target: Target) -> None:
        settings = target.config.weight_decay
        self._target = target
        self._coefficient = settings.awd_scale * target.config.base_decay
        self._smoothing = settings.awd_smoothing
        self._mean = 0.0
        self._count = 0

    def step(self, grad_norm: float) -> Record | None:
        """See `Policy`."""
        parameters = trainable(self._target.model).values()
        value = self._coefficient * grad_norm / total_norm(list(parameters))
        self._mean = (1 - self._smoothing) * self._mean + self._smoothing * value
        self._count += 1
        self._apply()
        is_due = self._count % self._target.config.weight_decay.interval == 0
        return Record(seconds=0.0, modules=_current(self._target)) if is_due else None

    def _apply(self) -> None:
        for group in self._target.decaying():
            group["weight_decay"] = self._mean

    def initial(self) -> Record | None:
        """See `Policy`."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """See `Policy`."""
        return {"mean": self._mean, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Policy`."""
        self._mean, self._count = float(state["mean"]), int(state["count"])
        self._apply()


class AdaDecay:
    """AdaDecay (Nakamura and Hong 2019, arXiv 1907.08931), module-wise as AlphaDecay compares with it.

    Each step the score of a module is the 2-norm of its gradient, and the decays are
    base * 2 / (1 + exp(-4 z)), z standardised inside each transformer block.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._count = 0

    def step(self, grad_norm: float) -> Record | None:
        """See `Policy`."""
        del grad_norm
        own = self._target.own_groups()
        scores = gradient_norms([parameter for _, parameter, _ in own])
        ratios = decay_ratios(scores, assign="sigmoid", layers=[module.layer for module, _, _ in own])
        for (_, _, group), ratio in zip(own, ratios, strict=True):
            group["weight_decay"] = self._target.config.base_decay * ratio
        self._count += 1
        if self._count % self._target.config.weight_decay.interval:
            return None
        decays = {
            module.name: Decay(weight_decay=float(group["weight_decay"]), score=score)
            for (module, _, group), score in zip(own, scores, strict=True)
        }
        return Record(seconds=0.0, modules=decays)

    def initial(self) -> Record | None:
        """See `Policy`."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """See `Policy`. The decays are of one step only: nothing else is kept."""
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Policy`."""
        self._count = int(state["count"])


class AdaDecayParameter:
    """AdaDecay's original rule: a decay for every single weight.

    In each matrix z_ij = (|g_ij| - mean |g|) / (std |g| + 1e-8), and the weight decays by
    base * 2 / (1 + exp(-4 z_ij)): decoupled, w_ij (1 - lr base theta_ij), or for Adam as L2 penalty added
    to the gradient. The optimizer's own decay of these matrices is 0.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._apply()

    def _apply(self) -> None:
        for _, _, group in self._target.own_groups():
            group["weight_decay"] = 0.0

    @torch.no_grad()
    def step(self, grad_norm: float) -> Record | None:
        """See `Policy`."""
        del grad_norm
        base = self._target.config.base_decay
        for _, parameter, group in self._target.own_groups():
            if parameter.grad is None:
                continue
            size = parameter.grad.abs().float()
            position = (size - size.mean()) / (size.std(correction=0) + 1e-8)
            decay = (base * 2 * torch.sigmoid(4 * position)).to(parameter.dtype)
            if self._target.config.optimizer.name == "adam":
                parameter.grad.add_(decay * parameter)
            else:
                parameter.mul_(1 - float(group["lr"]) * decay)
        return None

    def initial(self) -> Record | None:
        """See `Policy`."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """See `Policy`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Policy`."""
        del state
        self._apply()


def gradient_norms(parameters: Sequence[nn.Parameter]) -> list[float]:
    """2-norm of each gradient, 0 where there is none; of sharded gradients the whole norm, on every rank."""
    norms = {
        index: torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        for index, parameter in enumerate(parameters)
        if parameter.grad is not None
    }
    found = dict(zip(norms, _whole(torch.stack(list(norms.values()))).tolist(), strict=True)) if norms else {}
    return [float(found.get(index, 0.0)) for index in range(len(parameters))]


def total_norm(tensors: Sequence[torch.Tensor]) -> float:
    """2-norm of all tensors together, in float32; of sharded ones the whole, on every rank."""
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32) for tensor in tensors]
    return float(_whole(torch.linalg.vector_norm(torch.stack(norms))))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _current(target: Target) -> dict[str, Decay]:
    """The decays of the modules as the groups have them."""
    return {module.name: Decay(weight_decay=float(group["weight_decay"])) for module, _, group in target.own_groups()}


def make_policy(target: Target, *, resuming: bool) -> Policy:
    """The policy of [weight_decay].

    Args:
        target: what it works on.
        resuming: a state will be loaded at once, so that the initial spectra need not be computed.

    Raises:
        ConfigError, AssignmentError, UsageError: if its settings do not fit the model.
    """
    settings = target.config.weight_decay
    match settings.policy:
        case "uniform":
            return Constant(target, target.config.base_decay)
        case "none":
            return Constant(target, 0.0)
        case "awd":
            return Awd(target)
        case "adadecay":
            return AdaDecayParameter(target) if settings.adadecay_rule == "parameter" else AdaDecay(target)
        case "file":
            from esdtool.train.module_policies import FromFile

            return FromFile(target)
        case "alphadecay":
            from esdtool.train.module_policies import Spectral

            return Spectral(target, resuming=resuming)
    raise ConfigError(f"weight_decay.policy {settings.policy!r} is not known")


__all__ = ["Decay", "Policy", "Record", "Target", "gradient_norms", "make_policy", "total_norm"]
