"""From the ratios of modules to the decays of parameters: one that holds several modules takes their mean."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from esdtool.assignment.document import Entry, Members

AGGREGATE: Final = "parameter-weighted mean"
"""How the values of several modules become that of the parameter that holds them. It is the mean that keeps the
total decay: an optimizer that could decay each part by its own ratio would take as much from the weights."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One module's ratio and where it comes from."""

    name: str
    """Module name."""
    parameter: str
    """The parameter that holds it, alone or with others."""
    stored_shape: tuple[int, ...]
    """Shape of that parameter."""
    size: int
    """Weights in the module."""
    ratio: float
    alpha: float | None
    score: float | None
    role: str
    layer: int | None
    note: str | None


def merge_members(members: Sequence[Member], base: float) -> dict[str, tuple[Entry, Members | None]]:
    """The entries of a wd.json from the ratios of modules.

    Args:
        members: every module, those of one parameter in any order.
        base: base decay, which the ratios multiply.

    Returns:
        For each parameter, in the order of the first members, its entry, and what it holds if that is not one module.
    """
    groups: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        groups[member.parameter].append(member)
    return {
        parameter: (_entry(group, base), members_of([member.name for member in group]))
        for parameter, group in groups.items()
    }


def members_of(names: Sequence[str]) -> Members | None:
    """What the file says of a parameter's modules; None if it is only one."""
    return None if len(names) == 1 else Members.of(AGGREGATE, tuple(names))


def joined_roles(roles: Iterable[str]) -> str:
    """The role of a parameter with several modules.

    >>> joined_roles(["gate_proj", "up_proj", "gate_proj", "up_proj"])
    'gate_proj+up_proj'
    """
    return "+".join(dict.fromkeys(roles))


def weighted_mean(values: Sequence[float | None], sizes: Sequence[int]) -> float | None:
    """Mean of the values that are there, weighted by size; None if there are none.

    >>> weighted_mean([1.0, None, 4.0], [2, 5, 1])
    2.0
    """
    known = [(value, size) for value, size in zip(values, sizes, strict=True) if value is not None]
    if not known:
        return None
    first = known[0][0]
    # Relative to the first, so that the mean of equal numbers is that number to the last bit.
    total = math.fsum((value - first) * size for value, size in known)
    return first + total / sum(size for _, size in known)


def mean_entry(entries: Sequence[Entry], sizes: Sequence[int], *, shape: tuple[int, ...] | None) -> Entry:
    """One entry for a parameter from several: means weighted by size, the distinct roles and notes joined.

    Args:
        entries: at least one.
        sizes: weights that each stands for.
        shape: of the parameter.
    """
    decay = weighted_mean([entry.weight_decay for entry in entries], sizes)
    assert decay is not None
    return Entry(
        weight_decay=decay,
        ratio=weighted_mean([entry.ratio for entry in entries], sizes),
        alpha=weighted_mean([entry.alpha for entry in entries], sizes),
        score=weighted_mean([entry.score for entry in entries], sizes),
        role=joined_roles(entry.role for entry in entries if entry.role is not None) or None,
        layer=entries[0].layer,
        shape=shape,
        note="; ".join(dict.fromkeys(entry.note for entry in entries if entry.note is not None)) or None,
    )


def _entry(group: Sequence[Member], base: float) -> Entry:
    alone = len(group) == 1
    entries = [
        Entry(
            weight_decay=base * member.ratio,
            ratio=member.ratio,
            alpha=member.alpha,
            score=member.score,
            role=member.role,
            layer=member.layer,
            shape=member.stored_shape,
            note=member.note if alone or member.note is None else f"{member.name}: {member.note}",
        )
        for member in group
    ]
    if alone:
        return entries[0]
    mean = mean_entry(entries, [member.size for member in group], shape=group[0].stored_shape)
    assert mean.ratio is not None
    # Rounded as everywhere else: base times ratio.
    return mean.model_copy(update={"weight_decay": base * mean.ratio})
