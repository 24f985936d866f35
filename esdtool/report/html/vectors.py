"""The section of the report on singular vectors."""

from __future__ import annotations

from esdtool.analysis.document import Analysis
from esdtool.report.html.markup import Html, name_tag, tag
from esdtool.report.html.page import section
from esdtool.report.html.rows import ModuleRows
from esdtool.report.html.table import Cell, HtmlColumn, Row, table
from esdtool.report.tables.vectors import (
    LOCALISED_COLUMNS,
    ROLES_TITLE,
    VECTOR_ROLE_COLUMNS,
    localised_rows,
    localised_title,
    role_rows,
    without_vectors,
)

_WORDS = (
    "1 is what a random matrix gives, n where a single one of n channels carries each vector. Rows are the outputs of "
    "nn.Linear and columns its inputs."
)


def vectors_part(analysis: Analysis, rows: ModuleRows) -> Html | None:
    """Return the section, or None where no vectors were asked for."""
    if not analysis.settings.vectors:
        return None
    parts: list[Html] = []
    roles, localised = role_rows(analysis), localised_rows(analysis)
    if roles:
        body = [
            Row(
                cells=[
                    Cell(content=name_tag(column.cell(row)) if column.heading == "role" else column.cell(row))
                    for column in VECTOR_ROLE_COLUMNS
                ]
            )
            for row in roles
        ]
        parts.append(table(ROLES_TITLE, _columns([(c.heading, c.is_text) for c in VECTOR_ROLE_COLUMNS]), body))
        parts.append(tag("p", _WORDS, class_="note"))
        title = localised_title(analysis, localised)
        if localised:
            body = [
                Row(
                    cells=[
                        Cell(content=rows.link(row.module) if column.heading == "module" else column.cell(row))
                        for column in LOCALISED_COLUMNS
                    ]
                )
                for row in localised
            ]
            parts.append(table(title, _columns([(c.heading, c.is_text) for c in LOCALISED_COLUMNS]), body))
        else:
            parts.append(tag("p", f"{title.capitalize()}.", class_="note"))
    missing = without_vectors(analysis)
    if missing is not None:
        parts.append(tag("p", missing, class_="note"))
    return section("Singular vectors", parts, anchor="vectors") if parts else None


def _columns(headings: list[tuple[str, bool]]) -> list[HtmlColumn]:
    return [HtmlColumn(heading=heading, kind="text" if is_text else "number") for heading, is_text in headings]
