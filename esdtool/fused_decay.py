"""From the ratios of modules to the decays of parameters: one that holds several modules takes their mean."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from esdtool.assignment import Entry, Members

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


@dataclass(frozen=True, kw_only=True)
class Merged:
    """One entry a parameter."""

    entries: Mapping[str, Entry]
    """By parameter name, in the order of the first members."""
    members: Sequence[Members | None]
    """For each entry; None where the parameter is one module."""


def merge_members(members: Sequence[Member], base: float) -> Merged:
    """The entries of a wd.json from the ratios of modules.

    Args:
        members: every module, those of one parameter in any order.
        base: base decay, which the ratios multiply.
    """
    groups: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        groups[member.parameter].append(member)
    return Merged(
        entries={parameter: _entry(group, base) for parameter, group in groups.items()},
        members=[members_of([member.name for member in group]) for group in groups.values()],
    )


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


def _entry(group: Sequence[Member], base: float) -> Entry:
    first, sizes = group[0], [member.size for member in group]
    ratio = weighted_mean([member.ratio for member in group], sizes)
    assert ratio is not None
    notes = list(dict.fromkeys(f"{member.name}: {member.note}" for member in group if member.note is not None))
    return Entry(
        weight_decay=base * ratio,
        ratio=ratio,
        alpha=weighted_mean([member.alpha for member in group], sizes),
        score=weighted_mean([member.score for member in group], sizes),
        role=joined_roles(member.role for member in group),
        layer=first.layer,
        shape=first.stored_shape,
        note=first.note if len(group) == 1 else "; ".join(notes) or None,
    )
