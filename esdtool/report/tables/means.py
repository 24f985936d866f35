"""Means over the model and over each role, the same in the terminal, in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Callable

from esdtool.analysis.document import Analysis, RoleSummary
from esdtool.analysis.means import QUOTED, Mean
from esdtool.report.tables.analysis import Column, format_number

MEANS_TITLE = "means over the model"

ROLE_MEANS_TITLE = "means by role"

MeanRow = tuple[str, Mean]
"""The heading of a measure, and its mean."""

MEAN_COLUMNS: tuple[Column[MeanRow], ...] = (
    Column(heading="measure", cell=lambda row: row[0], is_text=True),
    Column(heading="mean", cell=lambda row: format_number(row[1].plain, ".3f")),
    Column(heading="by parameters", cell=lambda row: format_number(row[1].by_parameters, ".3f")),
    Column(heading="modules", cell=lambda row: str(row[1].count)),
    Column(heading="left out", cell=lambda row: str(row[1].left_out)),
)


def mean_rows(analysis: Analysis) -> list[MeanRow]:
    """Return the measures that at least one module has, with their means over the model."""
    means = analysis.summary.means
    return [(heading, means[name]) for name, heading in QUOTED.items() if name in means and means[name].count]


def role_mean_columns() -> list[Column[RoleSummary]]:
    """Return a column for each measure's plain mean over a role, with the count where modules are left out."""

    def cell(name: str) -> Callable[[RoleSummary], str]:
        return lambda row: _with_count(row.means.get(name))

    measures = [Column[RoleSummary](heading=heading, cell=cell(name)) for name, heading in QUOTED.items()]
    return [Column(heading="role", cell=lambda row: row.role, is_text=True), *measures]


def role_mean_rows(analysis: Analysis) -> list[RoleSummary]:
    """Return the roles whose means are known: all, unless a version before them wrote the analysis."""
    return [row for row in analysis.summary.by_role if row.means]


def _with_count(mean: Mean | None) -> str:
    if mean is None or mean.plain is None:
        return "-"
    number = f"{mean.plain:.3f}"
    return f"{number} ({mean.count} of {mean.count + mean.left_out})" if mean.left_out else number
