"""The trainable parameters of a model and the groups in which its optimizers hold them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from esdtool.names import canonical_name

if TYPE_CHECKING:
    import torch
    from torch import nn

Group = dict[str, Any]
"""A parameter group of a torch optimizer."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by canonical name, each once (tied ones under their first name)."""
    return {canonical_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def all_groups(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[Group]:
    """Yield every parameter group of every optimizer."""
    for optimizer in optimizers:
        yield from optimizer.param_groups


def groups_by_parameter(optimizers: Sequence[torch.optim.Optimizer]) -> dict[int, Group]:
    """The group of each parameter, by the parameter's `id`. Ask again after a state was loaded, which replaces them."""
    return {id(parameter): group for group in all_groups(optimizers) for parameter in group["params"]}


def mean_decay(optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """Return the mean weight decay over all trainable parameters, each element counting once."""
    total = weight = 0.0
    for group in all_groups(optimizers):
        size = sum(parameter.numel() for parameter in group["params"])
        total += size * float(group["weight_decay"])
        weight += size
    return total / weight
