"""From the ratios of modules to the decays of parameters: one that holds several modules takes their mean."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from esdtool.assignment.document import Entry, Members
from esdtool.assignment.scope import BASE_DECAY

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
    status: str = "ok"
    """`ok`, or why the module could not be scored and has ratio 1."""


def merge_members(members: Sequence[Member], base: float) -> dict[str, tuple[Entry, Members | None]]:
    """Make the entries of a wd.json from the ratios of modules.

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
    """List a parameter's modules for the file; None if it is only one."""
    return None if len(names) == 1 else Members.of(AGGREGATE, tuple(names))


def joined_roles(roles: Iterable[str]) -> str:
    """Join the roles of a parameter's modules into one.

    >>> joined_roles(["gate_proj", "up_proj", "gate_proj", "up_proj"])
    'gate_proj+up_proj'
    """
    return "+".join(dict.fromkeys(roles))


def weighted_mean(values: Sequence[float | None], sizes: Sequence[int]) -> float | None:
    """Take the mean of the values that are there, weighted by size; None if there are none.

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
    """Make one entry for a parameter from several: means weighted by size, the distinct roles and notes joined.

    Args:
        entries: at least one.
        sizes: the number of weights that each stands for.
        shape: the parameter's shape.
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
    entries = [
        Entry(
            weight_decay=base * member.ratio,
            ratio=member.ratio,
            alpha=member.alpha,
            score=member.score,
            role=member.role,
            layer=member.layer,
            shape=member.stored_shape,
        )
        for member in group
    ]
    entry = entries[0]
    if len(group) > 1:
        entry = mean_entry(entries, [member.size for member in group], shape=group[0].stored_shape)
        assert entry.ratio is not None
        # Rounded as everywhere else: base times ratio.
        entry = entry.model_copy(update={"weight_decay": base * entry.ratio})
    note = unscored_note(
        joined_status({member.name: member.status for member in group}),
        is_mean=any(member.status == "ok" for member in group),
        weight_decay=entry.weight_decay,
        base=base,
    )
    return entry.model_copy(update={"note": note})


def joined_status(statuses: Mapping[str, str]) -> str:
    """Say why modules of a parameter are not scored.

    >>> joined_status({"q": "ok", "v": "all elements are zero"})
    'v: all elements are zero'

    Args:
        statuses: `ok`, or why there is no score, of each module by name.

    Returns:
        `ok` if all are scored; the reason alone if it is that of every module, else by module.
    """
    unscored = {name: status for name, status in statuses.items() if status != "ok"}
    if not unscored:
        return "ok"
    reasons = set(unscored.values())
    if len(unscored) == len(statuses) and len(reasons) == 1:
        return reasons.pop()
    return "; ".join(f"{name}: {status}" for name, status in unscored.items())


def unscored_note(status: str, *, is_mean: bool, weight_decay: float, base: float) -> str | None:
    """Write the note of a parameter that does not follow the scores of all of its modules.

    >>> unscored_note("v: all elements are zero", is_mean=True, weight_decay=0.0835, base=0.1)
    'decay 0.0835 (base 0.1) is a mean in which what is not scored counts as the base: v: all elements are zero'

    Args:
        status: see `joined_status`.
        is_mean: whether other modules of the parameter are scored.
        weight_decay: the parameter's decay.
        base: the base decay.

    Returns:
        The note; None if all modules are scored.
    """
    if status == "ok":
        return None
    if not is_mean:
        return f"{BASE_DECAY}: {status}"
    return (
        f"decay {weight_decay:.4g} (base {base:g}) is a mean in which what is not scored counts as the base: {status}"
    )
