"""The report of one analysis, from the conclusion down to every tensor."""

from __future__ import annotations

from collections.abc import Sequence

from esdtool.analysis.document import Analysis
from esdtool.report.html.chart import depth_chart, range_glyph
from esdtool.report.html.colours import sequential
from esdtool.report.html.heads import heads_part
from esdtool.report.html.heatmap import Place, heat_maps, stack_of
from esdtool.report.html.lead import lead, subject
from esdtool.report.html.markup import DASH, Html, joined, name_tag, tag
from esdtool.report.html.means import means_part
from esdtool.report.html.module_table import glossary, module_table
from esdtool.report.html.page import noscript, page, section
from esdtool.report.html.panels import panel_data
from esdtool.report.html.rows import ModuleRows, rows_of_modules
from esdtool.report.html.skipped import skipped_part
from esdtool.report.html.table import Cell, HtmlColumn, Row, number, table
from esdtool.report.html.vectors import vectors_part
from esdtool.report.tables.experts import Experts

_DOTS = 4000
"""So many dots tell no more than the line through them."""


def analysis_page(analysis: Analysis, *, experts: Experts = "mean") -> str:
    """Return the report as one HTML file that needs nothing else, not even a network.

    Without JavaScript all of it can be read but the figures of single modules; tables then do not sort.

    Args:
        analysis: of one checkpoint; with its ESDs, if there are to be figures.
        experts: rows of a mixture of experts in the module table: each layer's mean, or all.
    """
    rows = rows_of_modules(analysis, experts)
    data, means = panel_data(analysis, rows), means_part(analysis)
    parts = [
        lead(analysis, rows),
        noscript(
            "Without JavaScript the tables cannot be sorted or filtered, and the modules' spectra and further metrics "
            "cannot be opened. All else is here; esdtool analyze --csv writes every number."
        ),
        *_alpha_parts(analysis, rows),
        *([] if means is None else [section("Means", means, anchor="means")]),
        *filter(None, [vectors_part(analysis, rows), heads_part(analysis)]),
        section("Modules", _modules(analysis, rows, data["missing"]), anchor="modules"),
    ]
    if analysis.skipped:
        parts.append(section("Skipped tensors", skipped_part(analysis.skipped), anchor="skipped"))
    title = f"{subject(analysis)}, spectral analysis"
    return page(title, parts, data)


def _alpha_parts(analysis: Analysis, rows: ModuleRows) -> list[Html]:
    parts = []
    # Alphas compare across shapes only with their nulls in mind; distances from random do as they are.
    by_distance = all(module.null_distance is not None for module in analysis.scored if module.layer is not None)
    layered = [module for module in analysis.modules if module.layer is not None]
    places = [
        Place(
            stack=stack_of(module.parameter, module.layer),
            layer=module.layer,
            role=module.role,
            value=module.alpha,
            shade=module.null_distance if by_distance else None,
        )
        for module in layered
        if module.layer is not None
    ]
    values = [place.value for place in places if place.value is not None]
    if values:
        parts.append(section("Alpha by layer and role", _map(analysis, rows, places, values), anchor="map"))
    if analysis.summary.by_role:
        parts.append(section("Alpha by role", _roles(analysis), anchor="roles"))
    if len(analysis.summary.by_layer) > 2:
        dots = [(place.layer, place.value, place.role) for place in places if place.value is not None]
        roles = list(dict.fromkeys(role for _, _, role in dots))
        means = [(row.layer, row.mean_alpha) for row in analysis.summary.by_layer]
        words = "Each mark is a module, a hollow one lies beyond the axis; the line goes through the layers' means."
        chart = depth_chart(dots if len(dots) <= _DOTS else [], means, sequential(values), roles)
        parts.append(section("Alpha by depth", [tag("p", words, class_="note"), chart], anchor="depth"))
    return parts


def _map(analysis: Analysis, rows: ModuleRows, places: Sequence[Place], values: Sequence[float]) -> Html:
    shades = [place.shade for place in places if place.shade is not None and place.value is not None]
    scale = sequential(shades or values)
    caption = f"Alpha by {analysis.settings.fit[0]}, modules of one cell averaged"
    if shades:
        caption += "; the colour is the distance from random, which compares across shapes"
    outside = [module for module in analysis.modules if module.layer is None and module.alpha is not None]
    parts = [
        heat_maps(places, scale, caption=caption),
        scale.legend(left="nearer to random", right="from random", spec=".0%")
        if shades
        else scale.legend(left="heavier tails", right="lighter tails"),
    ]
    if any(place.value is None for place in places):
        parts.append(tag("p", f"{DASH} no such module; n/s not scored.", class_="note"))
    if 0 < len(outside) <= 12:
        items = [tag("li", [rows.link(module.name), f" {module.alpha:.2f}"]) for module in outside]
        parts.append(tag("div", [tag("p", "Outside the numbered layers:"), tag("ul", items)], class_="note"))
    return joined(parts)


def _roles(analysis: Analysis) -> Html:
    by_role = analysis.summary.by_role
    scale = sequential([module.alpha for module in analysis.scored if module.alpha is not None])
    nulls = [row.mean_mp_alpha for row in by_role if row.mean_mp_alpha is not None]
    ends = min(scale.low, *nulls, scale.high), max(scale.low, *nulls, scale.high)
    columns = [
        HtmlColumn(heading="role"),
        *(HtmlColumn(heading=name, kind="number") for name in ("modules", "mean", "spread", "min", "max", "null")),
        HtmlColumn(heading="min to max, mean ●, null |"),
    ]
    body = [
        Row(
            cells=[
                Cell(content=name_tag(row.role)),
                number(row.count, "d"),
                number(row.mean_alpha, ".3f"),
                number(row.std_alpha, ".3f"),
                number(row.min_alpha, ".3f"),
                number(row.max_alpha, ".3f"),
                number(row.mean_mp_alpha, ".3f"),
                Cell(content=range_glyph(row.min_alpha, row.mean_alpha, row.max_alpha, row.mean_mp_alpha, ends=ends)),
            ]
        )
        for row in by_role
    ]
    caption = "Over the scored modules of each role; spread is the standard deviation, null the untrained alpha"
    return table(caption, columns, body)


def _modules(analysis: Analysis, rows: ModuleRows, missing: str | None) -> Html:
    parts = [module_table(analysis, rows)]
    if missing is not None:
        parts.insert(0, tag("p", missing, class_="note"))
    return joined([*parts, glossary(analysis)])
