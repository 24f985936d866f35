"""All modules of a comparison, with their alphas side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from esdtool.comparison.document import CheckpointComparison, ComparedModule, Side, is_significant
from esdtool.report.html.markup import DASH, Html, cut_name, joined, name_tag, shown, tag
from esdtool.report.html.rows import anchor
from esdtool.report.html.table import Cell, HtmlColumn, Row, number, table
from esdtool.report.tables.distances import DistanceColumn, distance_columns
from esdtool.support.words import dimensions, visible

_DELTA = "\N{GREEK CAPITAL LETTER DELTA}"
SIGNED = "+z.3f"
"""Format of a difference."""


def compared_table(comparison: CheckpointComparison) -> Html:
    """Return one row a module; for two checkpoints also the significance and both verdicts."""
    first, *others = comparison.labels
    two = len(others) == 1
    distances = distance_columns(
        None if side is None else side.distances for module in comparison.modules for side in module.sides
    )
    columns = [
        HtmlColumn(heading="module", filter=True),
        *(HtmlColumn(heading=name_tag(label), kind="number") for label in (first, *others)),
        *(HtmlColumn(heading=_DELTA if two else [f"{_DELTA} ", name_tag(label)], kind="number") for label in others),
        *([HtmlColumn(heading=f"{_DELTA} / error", kind="number")] if two else []),
        *(
            HtmlColumn(heading=found.heading if two else [f"{found.heading} ", name_tag(label)], kind="number")
            for label in others
            for found in distances
        ),
        HtmlColumn(heading="change", filter=True, choose="all changes"),
        HtmlColumn(heading="role", filter=True, choose="all roles"),
        HtmlColumn(heading="layer", kind="number"),
        HtmlColumn(heading="shape", kind="number"),
        *([HtmlColumn(heading="verdict", filter=True, choose="all verdicts")] if two else []),
    ]
    rows = (
        Row(cells=_cells(module, comparison.labels, distances, two=two), anchor=anchor(position))
        for position, module in enumerate(comparison.modules)
    )
    caption = f"Alpha by {comparison.fit} in each checkpoint; {_DELTA} is the difference from {first}"
    return table(caption, columns, rows, sortable="modules", anchor="module-table")


def difference_column(value: float | None) -> Cell:
    """Return a cell that shows a difference with its sign."""
    return Cell(content=DASH if value is None else shown(value, SIGNED), value=value, class_="strong")


def row_link(name: str, position: int) -> Html:
    """Return a link to a module's row in the table of all."""
    return tag("a", cut_name(name), href=f"#{anchor(position)}", aria_label=visible(name))


def _cells(
    module: ComparedModule, labels: tuple[str, ...], distances: Sequence[DistanceColumn], *, two: bool
) -> list[Cell]:
    sides = module.sides
    change = _change(module)
    cells = [
        Cell(content=joined([cut_name(module.name), *_other_names(module, labels)])),
        *(number(None if side is None else side.alpha, ".3f") for side in sides),
        *(difference_column(None if side is None else side.difference) for side in sides[1:]),
    ]
    last = sides[-1]
    if two:
        significance = None if last is None else last.significance
        cells.append(Cell(content=DASH if significance is None else shown(significance, "+z.1f"), value=significance))
    for side in sides[1:]:
        cells += [number(found.value(None if side is None else side.distances), found.spec) for found in distances]
    cells.append(Cell(content=change, class_="strong" if change in ("heavier", "lighter", "both") else "dull"))
    cells += [
        Cell(content=name_tag(module.role)),
        number(module.layer, "d"),
        Cell(content=dimensions(module.shape), value=math.prod(module.shape), class_="shape"),
    ]
    if two:
        cells.append(Cell(content=_verdicts(sides[0], last)))
    return cells


def _other_names(module: ComparedModule, labels: tuple[str, ...]) -> list[Html]:
    """Under which name the others have it, where more than outer prefixes differ."""
    return [
        tag("div", [name_tag(label), ": ", name_tag(side.name)], class_="note")
        for label, side in zip(labels, module.sides, strict=True)
        if side is not None and not f".{side.name}".endswith(f".{module.name}")
        if not f".{module.name}".endswith(f".{side.name}")
    ]


def _change(module: ComparedModule) -> str:
    """Summarise in which direction the alphas moved, as far as their errors tell."""
    differences = [side.difference for side in module.sides[1:] if side is not None and side.difference is not None]
    if not differences:
        return "not compared"
    moved = {
        side.difference < 0
        for side in module.sides[1:]
        if side is not None and side.difference is not None and is_significant(side)
    }
    if not moved:
        return "within errors" if any(differences) else "none"
    if len(moved) == 2:
        return "both"
    return "heavier" if True in moved else "lighter"


def _verdicts(before: Side | None, after: Side | None) -> str:
    words = [DASH if side is None else side.verdict for side in (before, after)]
    return words[0] if words[0] == words[1] else " → ".join(words)
