"""Tables that can be read without a script and sorted and filtered with one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from esdtool.report.html.markup import DASH, Content, Html, joined, rounded, tag

Kind = Literal["text", "number"]

_AT_ONCE = 500
"""Rows that a browser lays out while it loads the page; where it runs scripts, the others wait until asked for."""


@dataclass(frozen=True, kw_only=True)
class HtmlColumn:
    """One column of a table."""

    heading: Content
    kind: Kind = "text"
    filter: bool = False
    """Whether the text filter looks into it."""
    choose: str | None = None
    """Label of a list of the column's values to choose rows by; None for no list."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table."""

    content: Content = None
    value: float | None = None
    """What a column of numbers is sorted by; None comes last in either direction."""
    choice: str | None = None
    """What stands for the cell in the list of its column; None for its text."""
    class_: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table; the first cell is its heading."""

    cells: Sequence[Cell]
    anchor: str | None = None
    """Id of the table, for links."""


def number(value: float | None, spec: str, *, class_: str | None = None) -> Cell:
    """Return a cell that shows a number in few digits and is sorted by all of it."""
    text = DASH if value is None else format(value, spec)
    return Cell(content=text, value=value, class_=class_)


def table(
    caption: Content,
    columns: Sequence[HtmlColumn],
    rows: Iterable[Row],
    *,
    sortable: str | None = None,
    panels: bool = False,
    anchor: str | None = None,
) -> Html:
    """Return a table in a container of its own that scrolls sideways where the page is narrow.

    Args:
        caption: says what the table shows.
        columns: from left to right; the first one heads the rows.
        rows: of as many cells as there are columns.
        sortable: what the rows are, in the plural ("modules"): the script makes the table sortable and filterable.
        panels: whether the script gives each row a button for the panel that the page's data holds for it.
        anchor: id of the table.
    """
    heads = [
        tag(
            "th",
            joined(column.heading),
            scope="col",
            class_="n" if column.kind == "number" else None,
            data_kind=column.kind if sortable else None,
            data_filter=sortable is not None and column.filter,
            data_choose=column.choose if sortable else None,
        )
        for column in columns
    ]
    body = [_row(row, columns, sortable=sortable is not None) for row in rows]
    bodies = [tag("tbody", body if not sortable else body[:_AT_ONCE])]
    if sortable and len(body) > _AT_ONCE:
        bodies.append(tag("tbody", body[_AT_ONCE:], class_="rest"))
    whole = tag(
        "table",
        [tag("caption", joined(caption)), tag("thead", tag("tr", heads)), *bodies],
        id=anchor,
        data_sortable=sortable,
        data_panels=panels,
    )
    label = caption if isinstance(caption, str) and not isinstance(caption, Html) else None
    return scroller(whole, label=label, tall=sortable is not None)


def scroller(content: Html, *, label: str | None = None, tall: bool = False) -> Html:
    """Return a container that scrolls instead of the page, with a label for those who hear it."""
    # In the tab order, so that the keyboard can scroll it.
    classes = "scroll tall" if tall else "scroll"
    return tag("div", content, class_=classes, tabindex=0, role="group", aria_label=label)


def _row(row: Row, columns: Sequence[HtmlColumn], *, sortable: bool) -> Html:
    cells = []
    for position, (cell, column) in enumerate(zip(row.cells, columns, strict=True)):
        classes = " ".join(filter(None, ("n" if column.kind == "number" else None, cell.class_)))
        value = rounded(cell.value) if sortable and column.kind == "number" else None
        if value is not None and str(value) == cell.content:
            value = None  # the script takes it from the text
        cells.append(
            tag(
                "td" if position else "th",
                joined(cell.content),
                scope=None if position else "row",
                class_=classes or None,
                data_v=value,
                data_choice=cell.choice if sortable else None,
            )
        )
    return tag("tr", cells, id=row.anchor)
