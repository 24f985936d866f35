"""Every tensor that was left out, and why."""

from __future__ import annotations

from collections.abc import Sequence

from esdtool.analysis.document import SkippedResult
from esdtool.report.html.markup import Html, name_tag, tag
from esdtool.report.html.page import details
from esdtool.report.html.table import Cell, HtmlColumn, Row, number, table
from esdtool.report.tables.analysis import skipped_groups
from esdtool.support.words import dimensions

_NAMES = 200
"""Names listed in one group; of more the pattern tells enough."""


def skipped_part(skipped: Sequence[SkippedResult]) -> Html:
    """A closed part with a line for each group of tensors that differ only in an index, norms and biases last."""
    rows = [
        Row(
            cells=[
                Cell(content=_names(pattern, tensors), class_="long"),
                number(len(tensors), "d"),
                Cell(content=reason),
            ]
        )
        for reason, pattern, tensors in skipped_groups(skipped)
    ]
    columns = [HtmlColumn(heading="name"), HtmlColumn(heading="tensors", kind="number"), HtmlColumn(heading="reason")]
    plural = "tensor" if len(skipped) == 1 else "tensors"
    listing = table("Names that differ only in an index share a line (*)", columns, rows)
    return details(f"{len(skipped)} {plural} not analysed, with reasons", listing)


def _names(pattern: str, tensors: Sequence[SkippedResult]) -> Html:
    if len(tensors) == 1:
        return _named(tensors[0])
    items = [tag("li", _named(tensor)) for tensor in tensors[:_NAMES]]
    if len(tensors) > _NAMES:
        items.append(tag("li", f"and {len(tensors) - _NAMES} more"))
    heading = name_tag(pattern) if pattern else "norms and biases"
    return details(heading, tag("ul", items))


def _named(tensor: SkippedResult) -> Html:
    return tag("span", [name_tag(tensor.name), f" {dimensions(tensor.shape)} {tensor.dtype}"])
