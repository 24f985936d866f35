"""What a policy is, and what it works on; the constant one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from esdtool.modules import WeightModule
from esdtool.train.config.whole import TrainConfig
from esdtool.train.optimizers import Group, all_groups, groups_by_parameter, trainable


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
        return Record(seconds=0.0, modules=current_decay(self._target))

    def state_dict(self) -> dict[str, Any]:
        """See `Policy`."""
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Policy`."""
        del state  # the value is the configuration's
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


def current_decay(target: Target) -> dict[str, Decay]:
    """The decays of the modules as the groups have them."""
    return {module.name: Decay(weight_decay=float(group["weight_decay"])) for module, _, group in target.own_groups()}
