"""Rows, columns and words of a comparison of checkpoints, the same in the terminal and in Markdown.

Checkpoints are called A, B, C in the headings, whatever the length of their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from esdtool.analysis.distances import intruder_words
from esdtool.comparison.checkpoints import CheckpointComparison, ComparedModule, ComparedRole, Side, is_significant
from esdtool.comparison.document import SIGNIFICANT
from esdtool.report.tables.analysis import Column, Rows, cut, format_layer, format_number, missing_last
from esdtool.report.tables.distances import DistanceColumn, distance_columns
from esdtool.report.tables.experts import Experts, starred
from esdtool.support.words import dimensions

STAR = "*"
"""Behind a difference that is more than chance."""

LEGEND = f"{STAR} differs by more than {SIGNIFICANT:g} standard errors"

_ERRORS = "in std errors"

_SORT: dict[str, Callable[[ComparedModule], Any]] = {
    "name": lambda module: module.name,
    "role": lambda module: module.role,
    "layer": lambda module: -1 if module.layer is None else module.layer,
    "difference": lambda module: None if module.largest_difference is None else -abs(module.largest_difference),
}

_NAMED = 3
"""Modules that the closing words name."""


def letter(position: int) -> str:
    """Name the checkpoint for headings.

    >>> letter(0), letter(25), letter(26)
    ('A', 'Z', '#27')
    """
    return chr(ord("A") + position) if position < 26 else f"#{position + 1}"


def comparison_rows(
    comparison: CheckpointComparison, *, sort: str, top: int | None, experts: Experts
) -> Rows[ComparedModule]:
    """The modules in the order asked for (that of the first checkpoint, or by a key), experts folded by default."""
    modules = list(comparison.modules) if experts == "all" else fold_compared(comparison.modules)
    if sort != "order":
        modules.sort(key=missing_last(_SORT[sort]))
    folded = len(modules) < len(comparison.modules)
    return cut(modules, top=top, title=f"alpha by {comparison.fit}, module by module", folded=folded)


def fold_compared(modules: Sequence[ComparedModule]) -> list[ComparedModule]:
    """Return the modules, with all experts of one layer and role replaced by their mean.

    A mean difference is over the experts that are scored on both sides, and its standard error that of such a mean.
    """
    groups: dict[tuple[object, ...], list[ComparedModule]] = {}
    for position, module in enumerate(modules):
        key = (position,) if module.expert is None else (starred(module.name, module.expert), module.role)
        groups.setdefault(key, []).append(module)
    return [group[0] if group[0].expert is None else _mean(group) for group in groups.values()]


def compared_columns(comparison: CheckpointComparison, *, narrow: bool) -> list[Column[ComparedModule]]:
    """Return the columns of the module table; `narrow` leaves out what can be spared."""
    place: list[Column[ComparedModule]] = [
        Column(heading="role", cell=lambda module: module.role, is_text=True),
        Column(heading="layer", cell=lambda module: format_layer(module.layer)),
        Column(heading="shape", cell=lambda module: dimensions(module.shape)),
    ]
    columns: list[Column[ComparedModule]] = [
        Column(heading="module", cell=lambda module: module.name, is_text=True),
        *([] if narrow else place),
        Column(heading="A", cell=_alpha(0)),
    ]
    distances = distance_columns(
        None if side is None else side.distances for module in comparison.modules for side in module.sides
    )
    for position in range(1, len(comparison.checkpoints)):
        name = letter(position)
        columns.append(Column(heading=name, cell=_alpha(position)))
        columns.append(Column(heading=f"{name} - A", cell=_difference(position)))
        if not narrow:
            columns.append(Column(heading=_ERRORS, cell=_significance(position)))
        columns += [Column(heading=found.heading, cell=_distance(found, position)) for found in distances]
    if not narrow:
        columns.append(Column(heading="verdict", cell=_verdicts, is_text=True))
    return columns


def checkpoint_columns(comparison: CheckpointComparison) -> list[Column[int]]:
    """Return the columns of the table of checkpoints; its rows are their positions."""
    found, summary = comparison.checkpoints, comparison.summary

    def compared(value: Callable[[int], str]) -> Callable[[int], str]:
        return lambda position: value(position) if position else ""

    def subject(position: int) -> str:
        source = found[position].source
        return source.checkpoint if source.base is None else f"{source.checkpoint} minus {source.base}"

    return [
        Column(heading="", cell=letter, is_text=True),
        Column(heading="checkpoint", cell=subject, is_text=True),
        Column(heading="scored", cell=lambda position: f"{found[position].num_scored}"),
        Column(heading="mean alpha", cell=lambda position: format_number(summary.mean_alphas[position], ".3f")),
        Column(heading="compared", cell=compared(lambda position: str(summary.num_compared[position]))),
        Column(
            heading="mean change",
            cell=compared(lambda position: format_number(summary.mean_differences[position], "+.3f")),
        ),
        Column(heading="differ", cell=compared(lambda position: str(summary.num_significant[position]))),
    ]


def role_columns(comparison: CheckpointComparison) -> list[Column[ComparedRole]]:
    """Return the columns of the table by role."""

    def mean(position: int) -> Callable[[ComparedRole], str]:
        return lambda row: format_number(row.mean_alphas[position], ".3f")

    def change(position: int) -> Callable[[ComparedRole], str]:
        def cell(row: ComparedRole) -> str:
            here, first = row.mean_alphas[position], row.mean_alphas[0]
            return format_number(None if here is None or first is None else here - first, "+.3f")

        return cell

    def count(row: ComparedRole) -> str:
        return str(row.counts[0]) if len(set(row.counts)) == 1 else " / ".join(map(str, row.counts))

    columns: list[Column[ComparedRole]] = [
        Column(heading="role", cell=lambda row: row.role, is_text=True),
        Column(heading="modules", cell=count),
        Column(heading="A", cell=mean(0)),
    ]
    for position in range(1, len(comparison.checkpoints)):
        columns.append(Column(heading=letter(position), cell=mean(position)))
        columns.append(Column(heading=f"{letter(position)} - A", cell=change(position)))
    return columns


def moved_most(comparison: CheckpointComparison) -> list[tuple[ComparedModule, int]]:
    """(module, position of the checkpoint with its largest difference) of those that moved most."""
    by_name = {module.name: module for module in comparison.modules}
    return [(by_name[name], _where(by_name[name])) for name in comparison.summary.moved_most]


def moved_columns(comparison: CheckpointComparison) -> list[Column[tuple[ComparedModule, int]]]:
    """Return the columns of the table of `moved_most`."""
    where: list[Column[tuple[ComparedModule, int]]] = [
        Column(heading="in", cell=lambda found: letter(found[1]), is_text=True)
    ]
    return [
        Column(heading="module", cell=lambda found: found[0].name, is_text=True),
        *(where if len(comparison.checkpoints) > 2 else []),
        Column(heading="change", cell=lambda found: _difference(found[1])(found[0])),
        Column(heading=_ERRORS, cell=lambda found: _significance(found[1])(found[0])),
    ]


def comparison_words(comparison: CheckpointComparison) -> str:
    """Return the comparison in words, a sentence or two for each checkpoint after the first."""
    words = []
    for position in range(1, len(comparison.checkpoints)):
        words.append(_words(comparison, position))
        found = intruders(comparison, position)
        if found is not None:
            words.append(found)
    return " ".join(words)


def intruders(comparison: CheckpointComparison, position: int) -> str | None:
    """Return what is to be said of a checkpoint's intruder dimensions; None where nobody looked."""
    sides = [(module.name, side.distances) for module in comparison.modules if (side := module.sides[position])]
    return intruder_words(sides, similarity=None if comparison.pairs is None else comparison.pairs.intruder_similarity)


def _words(comparison: CheckpointComparison, position: int) -> str:
    summary, label = comparison.summary, comparison.labels[position]
    count, change = summary.num_compared[position], summary.mean_differences[position]
    if change is None:
        return f"{label} has no scored module in common with {comparison.labels[0]}."
    sides = [(module, side) for module in comparison.modules if (side := module.sides[position]) is not None]
    if all(not side.difference for _, side in sides):
        return f"{label}: all {count} alphas equal those of {comparison.labels[0]}."
    words = f"{label}: alpha {change:+.3f} on average over {_modules(count)}, against {comparison.labels[0]}"
    differ = [(module, side) for module, side in sides if is_significant(side)]
    if not differ:
        return f"{words}; none differs by more than {SIGNIFICANT:g} standard errors."
    heavier = sum((side.difference or 0.0) < 0 for _, side in differ)
    directions = [(heavier, "with a heavier tail"), (len(differ) - heavier, "with a lighter tail")]
    tally = ", ".join(f"{number} {direction}" for number, direction in directions if number)
    differ.sort(key=lambda found: -abs(found[1].difference or 0.0))
    named = ", ".join(f"{module.name} ({side.difference:+.2f})" for module, side in differ[:_NAMED])
    verb = "differs" if len(differ) == 1 else "differ"
    return f"{words}; {len(differ)} {verb} by more than {SIGNIFICANT:g} standard errors ({tally}), most: {named}."


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"


def _where(module: ComparedModule) -> int:
    amounts = [0.0 if side is None else abs(side.difference or 0.0) for side in module.sides]
    return amounts.index(max(amounts))


def _alpha(position: int) -> Callable[[ComparedModule], str]:
    def cell(module: ComparedModule) -> str:
        side = module.sides[position]
        return format_number(None if side is None else side.alpha, ".3f")

    return cell


def _difference(position: int) -> Callable[[ComparedModule], str]:
    def cell(module: ComparedModule) -> str:
        side = module.sides[position]
        shown = format_number(None if side is None else side.difference, "+.3f")
        return shown + STAR if is_significant(side) else shown

    return cell


def _significance(position: int) -> Callable[[ComparedModule], str]:
    def cell(module: ComparedModule) -> str:
        side = module.sides[position]
        return format_number(None if side is None else side.significance, "+.1f")

    return cell


def _distance(column: DistanceColumn, position: int) -> Callable[[ComparedModule], str]:
    def cell(module: ComparedModule) -> str:
        side = module.sides[position]
        return column.cell(None if side is None else side.distances)

    return cell


def _verdicts(module: ComparedModule) -> str:
    """Return the verdict, or how it changed along the checkpoints."""
    said = [side.verdict for side in module.sides if side is not None]
    return " -> ".join(word for place, word in enumerate(said) if place == 0 or word != said[place - 1])


def _mean(group: Sequence[ComparedModule]) -> ComparedModule:
    first = group[0]
    sides = tuple(
        _mean_side([side for module in group if (side := module.sides[position]) is not None])
        for position in range(len(first.sides))
    )
    scored = sum(module.sides[0] is not None and module.sides[0].alpha is not None for module in group)
    count = str(len(group)) if scored == len(group) else f"{scored} of {len(group)}"
    return first.model_copy(update={"name": f"{starred(first.name, first.expert)} ({count})", "sides": sides})


def _mean_side(sides: Sequence[Side]) -> Side | None:
    if not sides:
        return None
    known = [side for side in sides if side.alpha is not None] or sides
    both = [side for side in known if side.difference is not None]
    difference = fmean(side.difference or 0.0 for side in both) if both else None
    # Of each expert difference / significance is the error of its difference.
    errors = [(side.difference or 0.0) / side.significance for side in both if side.significance]
    error = math.hypot(*errors) / len(both) if errors else 0.0
    measured = [side.distances for side in sides if side.distances is not None]
    return known[0].model_copy(
        update={
            "distances": measured[0].mean(measured) if measured else None,
            **{name: _mean_of(known, name) for name in ("alpha", "alpha_stderr", "mp_alpha")},
            "difference": difference,
            "significance": None if difference is None or error == 0 else difference / error,
        }
    )


def _mean_of(sides: Sequence[Side], name: str) -> float | None:
    values = [value for side in sides if (value := getattr(side, name)) is not None]
    return fmean(values) if values else None
