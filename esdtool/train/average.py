"""The mean of the weights over the last steps of a run, which is evaluated beside the final weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from esdtool.train.config.train_config import TrainConfig
from esdtool.train.parameter_groups import trainable


def first_averaged_step(steps: int, fraction: float) -> int:
    """Return the first update, counted from 1, after which the weights enter the mean.

    >>> first_averaged_step(1000, 0.1), first_averaged_step(3, 0.1)
    (901, 3)
    """
    return steps - max(1, round(steps * fraction)) + 1


class WeightAverage:
    """A running mean of all trainable parameters, in float32, sharded as they are."""

    def __init__(self, model: nn.Module, *, first_step: int) -> None:
        """Take the parameters as they are now, sharded or not: the optimizer holds the same ones.

        Args:
            model: whose weights are averaged.
            first_step: of `first_averaged_step`.
        """
        self._parameters = trainable(model)
        self._first_step = first_step
        self._means: dict[str, torch.Tensor] = {}
        self.count = 0
        """Steps in the mean."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after an update, if it is one of the last."""
        if step < self._first_step:
            return
        self.count += 1
        for name, parameter in self._parameters.items():
            weights = parameter.detach().float()
            if name in self._means:
                self._means[name].lerp_(weights, 1 / self.count)
            else:
                self._means[name] = weights.clone()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the mean, rounded to its own dtype, and then its weights back."""
        with torch.no_grad():
            kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
            for name, mean in self._means.items():
                self._parameters[name].copy_(mean)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weights in kept.items():
                    self._parameters[name].copy_(weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps, whole tensors on the CPU. All ranks must call it."""
        return {"count": self.count, "means": {name: _whole(mean) for name, mean in self._means.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint.

        Raises:
            KeyError: if it is the state of another model.
        """
        self.count = int(state["count"])
        self._means = {name: _like(self._parameters[name], mean) for name, mean in state["means"].items()}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor, placed and sharded as the parameter is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)
    return whole.to(parameter.device)


def begin_average(model: nn.Module, config: TrainConfig) -> WeightAverage | None:
    """Begin the mean that a configuration asks for (`eval.average`), or None if it asks for none."""
    fraction = config.eval.average
    if fraction is None:
        return None
    return WeightAverage(model, first_step=first_averaged_step(config.schedule.steps, fraction))
