"""The section of the report on attention heads."""

from __future__ import annotations

from esdtool.analysis.document import Analysis
from esdtool.report.html.colours import sequential
from esdtool.report.html.heatmap import Place, heat_maps, stack_of
from esdtool.report.html.markup import Html, name_tag, tag
from esdtool.report.html.page import section
from esdtool.report.html.table import Cell, HtmlColumn, Row, table
from esdtool.report.tables.heads import HEADS_TITLE, block_columns, block_rows, nulls_words, unscored_words

_CELLS = 20_000
"""More make a page that browsers are slow with; --csv has every head."""


def heads_part(analysis: Analysis) -> Html | None:
    """Return the section, or None where no heads were analysed."""
    if not analysis.heads:
        return None
    columns = block_columns(analysis)
    headings = [HtmlColumn(heading=each.heading, kind="text" if each.is_text else "number") for each in columns]
    body = [
        Row(
            cells=[Cell(content=name_tag(each.cell(row)) if each.is_text else each.cell(row)) for each in columns],
        )
        for row in block_rows(analysis)
    ]
    parts = [table(HEADS_TITLE, headings, body)]
    parts += [
        tag("p", words, class_="note")
        for words in (nulls_words(analysis), unscored_words(analysis))
        if words is not None
    ]
    stacks = {
        head.attention: stack_of(f"{head.modules[0]}.weight", head.layer)
        for head in analysis.heads
        if head.layer is not None
    }
    several = len(set(stacks.values())) > 1
    places = [
        Place(
            stack=f"{stacks[head.attention]} {head.role}" if several else head.role,
            layer=head.layer,
            role=str(head.head),
            value=head.alpha,
        )
        for head in analysis.heads
        if head.layer is not None
    ]
    values = [place.value for place in places if place.value is not None]
    if values and len(places) <= _CELLS:
        scale = sequential(values)
        parts.append(heat_maps(places, scale, caption="Alpha by layer (down) and head (across)"))
        parts.append(scale.legend(left="heavier tails", right="lighter tails"))
    return section("Attention heads", parts, anchor="heads")
