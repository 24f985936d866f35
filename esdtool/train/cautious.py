"""Cautious weight decay (Chen et al. 2025, arXiv 2510.12402) around any optimizer with decoupled decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class CautiousDecay:
    """Decays a weight only where the optimizer's update does not push it away from zero.

    x <- x - lr (u + decay [u x >= 0] x), element by element, where u is the update. The optimizer steps without decay;
    the difference of the weights tells the sign of u, and what it moved is then decayed from where it was.

    Attach it after what multiplies learning rates, so that the decay takes the rate of the step.

    Args:
        optimizers: with decoupled decay: without decay, their step must be x - lr u.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._before: dict[int, list[tuple[dict[str, Any], float, float, list[torch.Tensor]]]] = {}
        """By optimizer, while it steps: each group with its learning rate, its decay and its weights before."""
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._take_decay)
            optimizer.register_step_post_hook(self._decay)

    def _take_decay(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        del arguments, keywords
        self._before[id(optimizer)] = []
        for group in optimizer.param_groups:
            decay = float(group["weight_decay"])
            if decay:
                weights = [_local(parameter).clone() for parameter in _updated(group)]
                self._before[id(optimizer)].append((group, float(group["lr"]), decay, weights))
                group["weight_decay"] = 0.0

    def _decay(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        del arguments, keywords
        with torch.no_grad():
            for group, lr, decay, weights in self._before.pop(id(optimizer), []):
                group["weight_decay"] = decay
                for parameter, before in zip(_updated(group), weights, strict=True):
                    after = _local(parameter)
                    # The update is `before - after`, over the learning rate.
                    aligned = (before - after) * before >= 0
                    after.sub_(before * aligned, alpha=lr * decay)


def _updated(group: dict[str, Any]) -> list[torch.Tensor]:
    """List the parameters of a group that its optimizer updates."""
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a parameter, detached."""
    detached = parameter.detach()
    return detached.to_local() if hasattr(detached, "to_local") else detached
