"""Means of the measures that the literature quotes, over the model and over each role."""

from __future__ import annotations

from esdtool.analysis.document import Analysis
from esdtool.report.html.markup import Html, joined, name_tag, tag
from esdtool.report.html.table import Cell, HtmlColumn, Row, number, table
from esdtool.report.tables.means import (
    MEAN_COLUMNS,
    MEANS_TITLE,
    ROLE_MEANS_TITLE,
    mean_rows,
    role_mean_columns,
    role_mean_rows,
)


def means_part(analysis: Analysis) -> Html | None:
    """Return both tables, or None where nothing was scored or the analysis has no means."""
    rows = mean_rows(analysis)
    if not rows:
        return None
    body = [
        Row(
            cells=[
                Cell(content=heading),
                number(mean.plain, ".3f"),
                number(mean.by_parameters, ".3f"),
                number(mean.count, "d"),
                number(mean.left_out, "d"),
            ]
        )
        for heading, mean in rows
    ]
    words = "Modules without a value are left out of a mean. Weighted by parameters, large modules count for more."
    headings = [
        HtmlColumn(heading=column.heading, kind="text" if column.is_text else "number") for column in MEAN_COLUMNS
    ]
    parts = [tag("p", words, class_="note"), table(MEANS_TITLE.capitalize(), headings, body)]
    if by_role := role_mean_rows(analysis):
        columns = role_mean_columns()
        rest = [
            Row(
                cells=[
                    Cell(content=name_tag(row.role)),
                    *(
                        Cell(content=column.cell(row), value=mean.plain)
                        for column, mean in zip(columns[1:], row.means.values(), strict=True)
                    ),
                ]
            )
            for row in by_role
        ]
        headings = [
            HtmlColumn(heading="role"),
            *(HtmlColumn(heading=each.heading, kind="number") for each in columns[1:]),
        ]
        parts.append(table(ROLE_MEANS_TITLE.capitalize(), headings, rest))
    return joined(parts)
