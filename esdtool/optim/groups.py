"""Parameter groups of a torch optimizer: split them without touching the optimizer's state, and set their decays.

`group["weight_decay"]` is read at every step, so that writing it takes effect at once. The state
(moments, step counts) is keyed by parameter, not by group, and so survives a split.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from esdtool.errors import AssignmentError

FOREIGN = (
    "the optimizer holds none of the model's parameters: build it after the model is moved, wrapped or sharded, "
    "and pass both to esdtool as they are then"
)

KeyOf = Callable[[nn.Parameter], Hashable]
"""Parameters with equal keys may share a group."""


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer]) -> tuple[Optimizer, ...]:
    """Return one or several optimizers as a tuple.

    Raises:
        AssignmentError: if there is none, or something else is among them.
    """
    optimizers = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
    if not optimizers:
        raise AssignmentError("no optimizer was given")
    for item in optimizers:
        if not hasattr(item, "param_groups"):
            raise AssignmentError(f"{type(item).__name__} is no optimizer: it has no param_groups")
    return optimizers


def check_order(model: object, optimizer: object, call: str) -> None:
    """Refuse a model and an optimizer that stand in each other's place.

    Args:
        model: what was given as the model.
        optimizer: what was given as the optimizer or optimizers.
        call: the call as it should be, for the message.

    Raises:
        AssignmentError: if the first is no module.
    """
    if isinstance(model, nn.Module):
        return
    if hasattr(model, "param_groups") or isinstance(optimizer, nn.Module):
        raise AssignmentError(f"model and optimizer are exchanged: it is {call}")
    raise AssignmentError(f"{type(model).__name__} is no torch module: it is {call}")


def optimized(optimizers: Iterable[Optimizer]) -> dict[nn.Parameter, dict[str, Any]]:
    """Each parameter with the group that holds it now. `load_state_dict` replaces groups: do not keep the result.

    Raises:
        AssignmentError: if two optimizers hold the same parameter.
    """
    found: dict[nn.Parameter, dict[str, Any]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in found:
                    raise AssignmentError(
                        f"a parameter of shape {list(parameter.shape)} is in two groups or optimizers"
                    )
                found[parameter] = group
    return found


def split(
    optimizer: Optimizer,
    key_of: KeyOf,
    *,
    allowed: bool,
    name_of: Callable[[nn.Parameter], str],
    values: str = "decays",
) -> None:
    """Split the groups of an optimizer so that all parameters of a group have one key.

    The parts of a group stand where it stood, in the order of their first parameters; the first part is the same
    dictionary as before, the others are copies of its options. Nothing happens where nothing needs to be split.

    Args:
        optimizer: changed in place.
        key_of: see `KeyOf`.
        allowed: False if no group may be split.
        name_of: a parameter's name, for the messages.
        values: what the parameters of a group share, for the messages.

    Raises:
        AssignmentError: if a group would have to be split, but must not be: not `allowed`, or a learning-rate
            scheduler or an optimizer wrapper already counts the groups.
    """
    parts_of = [_parts(group["params"], key_of) for group in optimizer.param_groups]
    crowded = next((parts for parts in parts_of if len(parts) > 1), None)
    if crowded is None:
        return
    first, second = (part[0][1] for part in crowded[:2])
    what = f"{name_of(first)} and {name_of(second)} need different {values} but share a group of {_kind(optimizer)}"
    if not allowed:
        raise AssignmentError(f"{what}, which must not be split; build the optimizer from param_groups instead")
    if _has_scheduler(optimizer):
        raise AssignmentError(
            f"{what}, to which a learning-rate scheduler is attached that counts its groups; "
            f"apply the {values} before the scheduler is built"
        )
    if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(unwrapped(optimizer)).__mro__):
        raise AssignmentError(f"{what}, which partitions its groups once; build it from param_groups instead")

    groups: list[dict[str, Any]] = []
    for group, parts in zip(optimizer.param_groups, parts_of, strict=True):
        names = group.get("param_names")
        for position, part in enumerate(parts):
            target = group if position == 0 else {option: _own(value) for option, value in group.items()}
            target["params"] = [parameter for _, parameter in part]
            if names is not None:
                target["param_names"] = [names[index] for index, _ in part]
            groups.append(target)
    # In place: wrappers of optimizers and schedulers of other quantities share this list.
    optimizer.param_groups[:] = groups


def set_decays(optimizer: Optimizer, decay_of: Callable[[nn.Parameter], float | None]) -> None:
    """Write each group's decay, as a plain float (numpy scalars break `torch.load(weights_only=True)`).

    Args:
        optimizer: changed in place; its groups must have been `split`.
        decay_of: a parameter's decay; None leaves the group as it is.

    Raises:
        AssignmentError: if the optimizer knows no weight decay, or a group would need two values.
    """
    for group in optimizer.param_groups:
        decays = {decay_of(parameter) for parameter in group["params"]}
        if decays <= {None}:
            continue
        if len(decays) > 1:
            raise AssignmentError(
                f"the parameters of one group of {_kind(optimizer)} need different decays: the groups have been "
                "changed since the decays were first applied"
            )
        if "weight_decay" not in group:
            raise AssignmentError(f"{_kind(optimizer)} has no weight_decay in its groups: it decays nothing")
        (decay,) = decays
        assert decay is not None
        group["weight_decay"] = float(decay)


def set_ratios(optimizer: Optimizer, ratio_of: Callable[[nn.Parameter], float | None]) -> None:
    """Multiply each group's learning rate by a ratio, once: the group keeps it as "lr_ratio".

    Args:
        optimizer: changed in place; its groups must have been `split`.
        ratio_of: a parameter's ratio; None is 1.

    Raises:
        AssignmentError: if a scheduler already counts on other rates, a group would need two ratios, or the ratio of
            a group was 0 before.
    """
    for group in optimizer.param_groups:
        ratios = {ratio_of(parameter) for parameter in group["params"]}
        if len(ratios) > 1:
            raise AssignmentError(
                f"the parameters of one group of {_kind(optimizer)} need different learning rates: the groups have "
                "been changed since the ratios were first applied"
            )
        (ratio,) = ratios or {None}
        new, old = 1.0 if ratio is None else float(ratio), group.get("lr_ratio", 1.0)
        if new == old:
            continue
        if _has_scheduler(optimizer):
            raise AssignmentError(
                f"a learning-rate scheduler is attached to {_kind(optimizer)} and counts on its rates; apply the "
                "ratios before the scheduler is built"
            )
        if old == 0:
            raise AssignmentError(f"a group of {_kind(optimizer)} has the ratio 0, from which its rate is not known")
        group["lr"] = group["lr"] / old * new
        group["lr_ratio"] = new


def is_l2(optimizer: Optimizer) -> bool:
    """Return whether an optimizer of the Adam family adds the decay to the gradient (L2) instead of to the step.

    Adam, Adamax, NAdam and RAdam do unless told otherwise.
    """
    inner = unwrapped(optimizer)
    if type(inner).__name__ not in ("Adam", "Adamax", "NAdam", "RAdam", "FusedAdam"):
        return False
    if "adam_w_mode" in vars(inner):  # apex and DeepSpeed
        return not vars(inner)["adam_w_mode"]
    return not any(group.get("decoupled_weight_decay", False) for group in inner.param_groups)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the torch optimizer inside a wrapper of Accelerate or Lightning."""
    inner = getattr(optimizer, "optimizer", None)
    return unwrapped(inner) if isinstance(inner, Optimizer) else optimizer


Part = list[tuple[int, nn.Parameter]]


def _parts(parameters: Sequence[nn.Parameter], key_of: KeyOf) -> list[Part]:
    """List (index, parameter) of a group's parameters, by key, in the order of first appearance."""
    parts: dict[Hashable, Part] = {}
    for index, parameter in enumerate(parameters):
        parts.setdefault(key_of(parameter), []).append((index, parameter))
    return list(parts.values())


def _own(value: object) -> object:
    """Copy an option for another group: schedulers fill a tensor (a learning rate, say) in place."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _has_scheduler(optimizer: Optimizer) -> bool:
    """Return whether a scheduler of `torch.optim.lr_scheduler` has wrapped the optimizer's step."""
    return any(hasattr(item.step, "_wrapped_by_lr_sched") for item in (optimizer, unwrapped(optimizer)))


def _kind(optimizer: Optimizer) -> str:
    return type(unwrapped(optimizer)).__name__
