"""Weight-decay policies: what sets the decay of each parameter group, step by step.

All of them write Python floats into the optimizers' `param_groups`, before the optimizer step.
The formulas are in `esdtool.assignment.rule`, the spectra in `esdtool.optim.AlphaDecay`: here are
only the rules that belong to training alone.
"""

from __future__ import annotations

from typing import Any

import torch

from esdtool.assignment.rule import decay_ratios
from esdtool.train.optimizers import trainable
from esdtool.train.policies.base import Decay, Record, Target, current_decay, gradient_norms, total_norm


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
        return Record(seconds=0.0, modules=current_decay(self._target)) if is_due else None

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
