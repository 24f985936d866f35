"""A weight-decay assignment on a model, once: groups for a new optimizer, or an existing one changed."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from esdtool.assignment.document import Assignment, load_assignment
from esdtool.assignment.options import Unlisted
from esdtool.errors import AssignmentError
from esdtool.optim import groups
from esdtool.optim.live_names import fitted
from esdtool.optim.parameters import LiveModel, live_model, resolve, unlisted_decay, warn_unmatched

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of each entry of an assignment."""

    matched: tuple[str, ...]
    """Entries whose parameter is in the model, in the file's order."""
    unmatched: tuple[str, ...]
    """Entries that name no parameter of the model (only without `strict`)."""
    conflicts: tuple[str, ...]
    """Tied parameters whose entries contradict each other, in words; left as unlisted (only without `strict`)."""
    not_optimized: tuple[str, ...]
    """Matched entries whose parameter no optimizer holds: it is frozen, or belongs to another optimizer."""
    num_groups: int
    """Parameter groups of all optimizers together, afterwards."""


def param_groups(
    model: nn.Module,
    assignment: Assignment | str | PathLike[str],
    base: float | None = None,
    unlisted: Unlisted = "keep",
    strict: bool = True,
    merge: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer.

        optimizer = torch.optim.AdamW(param_groups(model, "wd.json"), lr=1e-3)

    Args:
        model: the model to be optimized. Wrappers (torch.compile, DataParallel, FSDP2) do not change names. Parameters
            with `requires_grad=False` are left out.
        assignment: an assignment or the path of its file.
        base: base decay instead of the file's; the ratios stay.
        unlisted: `keep` what the file says of unlisted parameters - if it says `keep` too, their group carries no
            `weight_decay`, so that the optimizer's own argument holds -, `no-decay`, or `base`.
        strict: refuse entries that name no parameter of the model; otherwise they are reported by a warning.
        merge: put parameters of equal decay in one group, which keeps fused and foreach kernels effective; otherwise
            every listed parameter has a group of its own.

    Returns:
        Groups in the order of their first parameters, each with "params" and (see `unlisted`) "weight_decay".

    Raises:
        AssignmentError: if the file is invalid or does not fit the model: wrong shape, unknown name (`strict`), one
            tied parameter with two values (`strict`), or nothing that matches at all.
    """
    chosen = fitted(_loaded(assignment, base), model)
    live = live_model(model)
    found = resolve(live, chosen, strict=strict)
    if not strict:
        warn_unmatched(found)
    if not found.decays:
        raise AssignmentError("no parameter of the model is in the assignment")
    _remark_on_frozen(found.decays, live)
    parts: dict[Hashable, tuple[float | None, list[nn.Parameter]]] = {}
    for name, parameter in live.distinct.items():
        if not parameter.requires_grad:
            continue
        decay = found.decays.get(parameter)
        key: Hashable = decay
        if decay is None:
            key = decay = unlisted_decay(chosen, unlisted, parameter.ndim)
        elif not merge:
            key = name
        parts.setdefault(key, (decay, []))[1].append(parameter)
    return [
        {"params": parameters} if decay is None else {"params": parameters, "weight_decay": float(decay)}
        for decay, parameters in parts.values()
    ]


def apply(
    optimizer: Optimizer | Sequence[Optimizer],
    assignment: Assignment | str | PathLike[str],
    model: nn.Module,
    base: float | None = None,
    unlisted: Unlisted = "keep",
    strict: bool = True,
    split: bool = True,
) -> Report:
    """Write an assignment's decays into an existing optimizer, splitting its groups where they need several values.

    The state of the optimizer (moments, step counts) stays. Call it before a learning-rate scheduler is built, since
    schedulers count groups, and once more after `optimizer.load_state_dict`, which restores old decays.

    Args:
        optimizer: one or several (Muon beside AdamW, ...).
        assignment: an assignment or the path of its file.
        model: the model whose parameters the optimizer holds.
        base: base decay instead of the file's; the ratios stay.
        unlisted: `keep` what the file says of unlisted parameters - if it says `keep` too, they stay as they are -,
            `no-decay`, or `base`.
        strict: refuse entries that name no parameter of the model; otherwise they are in the report.
        split: allow to split groups.

    Raises:
        AssignmentError: as `param_groups`; or if the optimizer holds none of the model's parameters or has no weight
            decay, or a group needs two values and cannot be split.
    """
    chosen = fitted(_loaded(assignment, base), model)
    live = live_model(model)
    found = resolve(live, chosen, strict=strict)
    optimizers = groups.as_optimizers(optimizer)
    held = groups.optimized(optimizers)
    if not any(parameter in held for parameter in live.names):
        raise AssignmentError(groups.FOREIGN)

    def decay_of(parameter: nn.Parameter) -> float | None:
        decay = found.decays.get(parameter)
        if decay is not None or parameter not in live.names:
            return decay
        return unlisted_decay(chosen, unlisted, parameter.ndim)

    _remark_on_frozen(found.decays, live)
    for item in optimizers:
        groups.split(item, decay_of, allowed=split, name_of=lambda parameter: live.names.get(parameter, ("?",))[0])
    for item in optimizers:
        groups.set_decays(item, decay_of)
    return Report(
        matched=found.matched,
        unmatched=found.unmatched,
        conflicts=found.conflicts,
        not_optimized=tuple(name for name in found.matched if live.lookup(name) not in held),
        num_groups=sum(len(item.param_groups) for item in optimizers),
    )


def _remark_on_frozen(decays: Mapping[nn.Parameter, float], live: LiveModel) -> None:
    """Say that an assignment changes nothing, where all of its parameters are frozen, as under adapters."""
    if decays and not any(parameter.requires_grad for parameter in decays):
        name = live.names[next(iter(decays))][0]
        _LOG.warning(
            "all %d parameters of the assignment are frozen (%s), as the base of an adapter is: no decay changes. "
            "The adapter's own parameters keep the decay for unlisted ones",
            len(decays),
            name,
        )


def _loaded(assignment: Assignment | str | PathLike[str], base: float | None) -> Assignment:
    chosen = assignment if isinstance(assignment, Assignment) else load_assignment(Path(assignment))
    return chosen if base is None else chosen.with_base(base)
