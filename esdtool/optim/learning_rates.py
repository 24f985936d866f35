"""Multiply the learning rates of a scheduler, whatever the scheduler.

Schedulers of one kind compute the rate of a group from its first rate, others (cosine annealing, exponential decay,
reduction on a plateau, ...) from the group's last one, so that a factor left in `group["lr"]` would be lost or raised
to a power. Here it stands there only while the optimizer steps: hooks of the optimizer multiply before and restore
after. Schedulers, loggers and checkpoints see the rate without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from esdtool.errors import AssignmentError
from esdtool.optim import groups

RatioOf = Callable[[nn.Parameter], float | None]
"""A parameter's learning rate over that of the scheduler; None is 1."""

Rate = float | torch.Tensor
"""A learning rate: a number, or a tensor of one element (capturable optimizers)."""


class ScaledRates:
    """Multiplies the learning rates of optimizers while they step.

    Args:
        optimizers: their groups must hold parameters of one ratio each whenever they step.
        by: name of the schedule, for messages.

    Raises:
        AssignmentError: if an optimizer cannot have several learning rates, or another schedule multiplies its rates.
    """

    def __init__(self, optimizers: Sequence[Optimizer], *, by: str) -> None:
        self._by = by
        self._optimizers = [groups.unwrapped(optimizer) for optimizer in optimizers]
        for optimizer in self._optimizers:
            _check(optimizer, by)
        self._ratio_of: RatioOf = _none
        self._saved: dict[int, list[tuple[dict[str, Any], Rate, Rate]]] = {}
        """By optimizer, while it steps: each group with its own rate and the one that was written."""
        self._hooks: list[Any] = []
        for optimizer in self._optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._before))
            self._hooks.append(optimizer.register_step_post_hook(self._after))

    def set(self, ratio_of: RatioOf) -> None:
        """Take other ratios from the next step on, or in the step under way (whose closure may have come here).

        Raises:
            AssignmentError: if parameters of one group have different ratios.
        """
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                self._ratio(optimizer, group, ratio_of)
        self._ratio_of = ratio_of
        for optimizer in self._optimizers:
            if id(optimizer) in self._saved:
                self._multiply(optimizer)

    def rate(self, group: dict[str, Any]) -> float:
        """Return the learning rate with which a group steps, or would now."""
        for saved in self._saved.values():
            for stepping, _, written in saved:
                if stepping is group and _is_same(group["lr"], written):
                    return float(written)
        ratio = self._ratio_of(group["params"][0])
        return float(group["lr"] if ratio is None else group["lr"] * ratio)

    def remove(self) -> None:
        """Leave the optimizers alone from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        del arguments, keywords
        self._multiply(optimizer)

    def _after(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        del arguments, keywords
        for group, own, written in self._saved.pop(id(optimizer), []):
            if _is_same(group["lr"], written):
                group["lr"] = own

    def _multiply(self, optimizer: Optimizer) -> None:
        # What is still there of a step that failed, or of the ratios before the closure, is not multiplied again.
        self._after(optimizer, None, None)
        saved = []
        for group in optimizer.param_groups:
            ratio = self._ratio(optimizer, group, self._ratio_of)
            if ratio != 1.0:
                own = group["lr"]
                # A tensor may belong to several groups: it stays what it is.
                group["lr"] = own * ratio
                saved.append((group, own, group["lr"]))
        self._saved[id(optimizer)] = saved

    def _ratio(self, optimizer: Optimizer, group: dict[str, Any], ratio_of: RatioOf) -> float:
        ratios = {ratio_of(parameter) for parameter in group["params"]} or {None}
        if len(ratios) > 1:
            raise AssignmentError(
                f"the parameters of one group of {type(optimizer).__name__} need different learning rates: the groups "
                f"have been changed since {self._by} was built"
            )
        (ratio,) = ratios
        return 1.0 if ratio is None else ratio


def _none(parameter: nn.Parameter) -> None:
    """Leave a parameter its scheduler's rate."""


def _check(optimizer: Optimizer, by: str) -> None:
    kind = type(optimizer).__name__
    if not hasattr(optimizer, "register_step_pre_hook"):
        raise AssignmentError(f"{by} cannot follow the steps of {kind}, which is no torch.optim.Optimizer")
    for group in optimizer.param_groups:
        if "lr" not in group:
            raise AssignmentError(f"{kind} has no lr in its groups: {by} has nothing to multiply")
        # Prodigy, D-Adaptation and their like find one step size for all groups, and keep it there as `d`.
        if "d" in group:
            raise AssignmentError(
                f"{kind} finds one learning rate for all parameters by itself and takes no other per group: "
                f"use {by} with an optimizer whose rate is given"
            )
    for hook in optimizer._optimizer_step_pre_hooks.values():
        if isinstance(getattr(hook, "__self__", None), ScaledRates):
            raise AssignmentError(
                f"the learning rates of this {kind} are multiplied already: close() that schedule first"
            )


def _is_same(now: Rate, written: Rate) -> bool:
    """Tell whether nobody has set a rate since it was written."""
    if isinstance(now, torch.Tensor) or isinstance(written, torch.Tensor):
        return now is written
    return now == written or (math.isnan(now) and math.isnan(written))
