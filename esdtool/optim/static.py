"""Weight decays and learning rates of a file on a model, once: groups for a new optimizer, or one changed."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from esdtool.assignment.allocation import Allocation
from esdtool.assignment.document import Assignment
from esdtool.assignment.options import Unlisted
from esdtool.assignment.reading import load_allocation, naming
from esdtool.errors import AssignmentError
from esdtool.optim import groups
from esdtool.optim.live_names import fitted
from esdtool.optim.parameters import LiveModel, Resolution, live_model, resolve, unlisted_decay, warn_unmatched

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


File = Assignment | Allocation | str | PathLike[str]
"""An assignment of either version, or the path of its file."""


def param_groups(
    model: nn.Module,
    assignment: File,
    base: float | None = None,
    unlisted: Unlisted = "keep",
    strict: bool = True,
    merge: bool = True,
    lr: float | None = None,
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
        merge: put parameters of equal values in one group, which keeps fused and foreach kernels effective; otherwise
            every listed parameter has a group of its own.
        lr: the optimizer's learning rate, which the file's ratios multiply; needed for a file that has such ratios.

    Returns:
        Groups in the order of their first parameters, each with "params" and (see `unlisted`) "weight_decay"; with
        ratios of learning rates also "lr" and "lr_ratio".

    Raises:
        AssignmentError: if the file is invalid or does not fit the model: wrong shape, unknown name (`strict`), one
            tied parameter with two values (`strict`), or nothing that matches at all; or if `lr` is missing.
    """
    if not isinstance(model, nn.Module):
        raise AssignmentError(f"{type(model).__name__} is no torch module: it is param_groups(model, assignment)")
    live = live_model(model)
    values = _Values.of(assignment, base, model=model, live=live, unlisted=unlisted, strict=strict)
    if values.rates is not None and lr is None:
        raise AssignmentError(
            "the file holds ratios of learning rates: give the rate that they multiply, param_groups(..., lr=1e-3)"
        )
    if not strict:
        for resolution in values.resolutions:
            warn_unmatched(resolution)
    if not any(resolution.decays for resolution in values.resolutions):
        raise AssignmentError("no parameter of the model is in the assignment")
    for resolution in values.resolutions:
        _remark_on_frozen(resolution.decays, live)
    parts: dict[Hashable, tuple[float | None, float | None, list[nn.Parameter]]] = {}
    for name, parameter in live.distinct.items():
        if not parameter.requires_grad:
            continue
        decay, ratio = values.decay(parameter), values.ratio(parameter)
        key: Hashable = (decay, ratio)
        if not merge and any(parameter in resolution.decays for resolution in values.resolutions):
            key = name
        parts.setdefault(key, (decay, ratio, []))[2].append(parameter)
    found = []
    for decay, ratio, parameters in parts.values():
        group: dict[str, Any] = {"params": parameters}
        if decay is not None:
            group["weight_decay"] = float(decay)
        if ratio is not None and lr is not None:
            group |= {"lr": lr * ratio, "lr_ratio": float(ratio)}
        found.append(group)
    return found


def apply(
    optimizer: Optimizer | Sequence[Optimizer],
    assignment: File,
    model: nn.Module,
    base: float | None = None,
    unlisted: Unlisted = "keep",
    strict: bool = True,
    split: bool = True,
) -> Report:
    """Write an assignment's values into an existing optimizer, splitting its groups where they need several.

    The state of the optimizer (moments, step counts) stays. Call it before a learning-rate scheduler is built, since
    schedulers count groups, and once more after `optimizer.load_state_dict`, which restores old decays. Ratios of
    learning rates multiply the rate of each group and are kept in the group as "lr_ratio", so that a second call does
    not multiply again.

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
            decay, a group needs two values and cannot be split, or a scheduler already counts on other rates.
    """
    groups.check_order(model, optimizer, "apply(optimizer, assignment, model)")
    live = live_model(model)
    values = _Values.of(assignment, base, model=model, live=live, unlisted=unlisted, strict=strict)
    optimizers = groups.as_optimizers(optimizer)
    held = groups.optimized(optimizers)
    if not any(parameter in held for parameter in live.names):
        raise AssignmentError(groups.FOREIGN)

    def values_of(parameter: nn.Parameter) -> Hashable:
        return values.decay(parameter), values.ratio(parameter)

    for resolution in values.resolutions:
        _remark_on_frozen(resolution.decays, live)
    what = "decays" if values.rates is None else "values"
    for item in optimizers:
        groups.split(
            item,
            values_of,
            allowed=split,
            name_of=lambda parameter: live.names.get(parameter, ("?",))[0],
            values=what,
        )
    for item in optimizers:
        groups.set_decays(item, values.decay)
        if values.rates is not None:
            groups.set_ratios(item, values.ratio)
    matched = tuple(dict.fromkeys(name for resolution in values.resolutions for name in resolution.matched))
    return Report(
        matched=matched,
        unmatched=tuple(dict.fromkeys(name for resolution in values.resolutions for name in resolution.unmatched)),
        conflicts=tuple(conflict for resolution in values.resolutions for conflict in resolution.conflicts),
        not_optimized=tuple(name for name in matched if live.lookup(name) not in held),
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


@dataclass(frozen=True, kw_only=True)
class _Values:
    """The values of a file on a live model."""

    live: LiveModel
    assignment: Assignment | None
    """The weight decays; None if the file has none."""
    decays: Resolution | None
    rates: Resolution | None
    """The ratios of learning rates; None if the file has none."""
    unlisted: Unlisted

    @classmethod
    def of(
        cls,
        assignment: File,
        base: float | None,
        *,
        model: nn.Module,
        live: LiveModel,
        unlisted: Unlisted,
        strict: bool,
    ) -> _Values:
        """Read the file, and find its parameters in the model."""
        chosen = assignment if isinstance(assignment, Assignment | Allocation) else load_allocation(Path(assignment))
        if base is not None:
            chosen = chosen.with_base(base)
        decays = chosen if isinstance(chosen, Assignment) else chosen.decays
        rates = None if isinstance(chosen, Assignment) else chosen.rates
        if decays is None and rates is None:
            raise AssignmentError("the file holds neither weight decays nor ratios of learning rates")
        with naming(assignment):
            decays = None if decays is None else fitted(decays, model)
            return cls(
                live=live,
                assignment=decays,
                decays=None if decays is None else resolve(live, decays, strict=strict),
                rates=None
                if rates is None
                else resolve(live, fitted(rates, model), strict=strict, values="learning-rate ratios"),
                unlisted=unlisted,
            )

    @property
    def resolutions(self) -> tuple[Resolution, ...]:
        """What was found, for each quantity of the file."""
        return tuple(resolution for resolution in (self.decays, self.rates) if resolution is not None)

    def decay(self, parameter: nn.Parameter) -> float | None:
        """Return the decay of a parameter; None leaves it as it is."""
        if self.assignment is None or self.decays is None:
            return None
        decay = self.decays.decays.get(parameter)
        if decay is not None or parameter not in self.live.names:
            return decay
        return unlisted_decay(self.assignment, self.unlisted, parameter.ndim)

    def ratio(self, parameter: nn.Parameter) -> float | None:
        """Return the ratio of the learning rate of a parameter; None if the file has none for it."""
        return None if self.rates is None else self.rates.decays.get(parameter)
