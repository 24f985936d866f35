"""The report of a comparison: what moved from the first checkpoint to the others."""

from __future__ import annotations

from esdtool._version import __version__
from esdtool.comparison.document import SIGNIFICANT, CheckpointComparison, is_significant
from esdtool.report.html.chart import shift_glyph
from esdtool.report.html.colours import diverging
from esdtool.report.html.comparison_table import SIGNED, compared_table, difference_column, row_link
from esdtool.report.html.heatmap import Place, heat_maps, stack_of
from esdtool.report.html.markup import DASH, Html, joined, name_tag, shown, tag
from esdtool.report.html.page import details, facts, noscript, page, section
from esdtool.report.html.table import Cell, HtmlColumn, Row, number, table
from esdtool.report.tables.comparison import intruders
from esdtool.support.words import dimensions

_MAPS = 6
"""Checkpoints with a map of differences each; of more the table tells."""


def comparison_page(comparison: CheckpointComparison) -> str:
    """Return the comparison as one HTML file that needs nothing else, not even a network.

    Args:
        comparison: of two checkpoints or more; differences are from the first.
    """
    parts = [
        _lead(comparison),
        noscript("Without JavaScript the table of modules cannot be sorted or filtered. All else is here."),
        section("Checkpoints", _checkpoints(comparison), anchor="checkpoints"),
    ]
    if comparison.summary.moved_most:
        parts.append(section("Modules that moved most", _moved_most(comparison), anchor="moved"))
    if comparison.summary.by_role:
        parts.append(section("Alpha by role", _roles(comparison), anchor="roles"))
    maps = _maps(comparison)
    if maps is not None:
        parts.append(section("Difference by layer and role", maps, anchor="map"))
    if comparison.modules:
        parts.append(section("Modules", compared_table(comparison), anchor="modules"))
    if comparison.unmatched:
        parts.append(section("Modules without a counterpart", _unmatched(comparison), anchor="unmatched"))
    return page(f"{' against '.join(comparison.labels)}, alphas compared", parts, None)


def _lead(comparison: CheckpointComparison) -> Html:
    first, *others = comparison.labels
    listed: list[str] = []
    for position, label in enumerate(others):
        listed += [", " if position else "", name_tag(label)]
    heading = [tag("span", "Alphas compared: ", class_="kind"), *listed, " against ", name_tag(first)]
    words = [
        tag("p", joined([_sentence(comparison, position), *_more(intruders(comparison, position))]), class_="lead")
        for position in range(1, len(others) + 1)
    ]
    notes = [tag("li", note) for note in comparison.notes]
    pairs = [
        ("alpha by", comparison.fit),
        ("modules compared", str(len(comparison.modules))),
        ("without counterpart", str(len(comparison.unmatched))),
        ("compared by", comparison.created_by),
    ]
    if comparison.created_by != f"esdtool {__version__}":
        pairs.append(("page by", f"esdtool {__version__}"))
    parts = [tag("h1", heading), *words[:_MAPS]]
    if notes:
        parts.append(tag("div", [tag("p", tag("b", "Mind that")), tag("ul", notes)], class_="bad"))
    return tag("header", [*parts, facts([(term, value) for term, value in pairs])])


def _more(sentence: str | None) -> list[str]:
    return [] if sentence is None else [" ", sentence]


def _sentence(comparison: CheckpointComparison, position: int) -> Html:
    """Summarise what became of the first checkpoint's alphas in another."""
    summary = comparison.summary
    before, after = summary.mean_alphas[0], summary.mean_alphas[position]
    label = name_tag(comparison.labels[position])
    mean, count = summary.mean_differences[position], summary.num_compared[position]
    if before is None or after is None or mean is None:
        return joined([label, ": no module is scored in both checkpoints."])
    sides = [side for module in comparison.modules if (side := module.sides[position]) is not None]
    if not any(side.difference for side in sides):
        return joined([label, f": all {count} alphas are those of ", name_tag(comparison.labels[0]), "."])
    words = (
        f": mean alpha {after:.2f}, was {before:.2f}; {shown(mean, SIGNED)} on average over {count} modules in both. "
    )
    moved = [side.difference for side in sides if side.difference is not None and is_significant(side)]
    if not moved:
        return joined([label, f"{words}None differs by more than {SIGNIFICANT:g} standard errors."])
    heavier = sum(difference < 0 for difference in moved)
    directions = ((heavier, "with a heavier tail"), (len(moved) - heavier, "with a lighter tail"))
    tally = ", ".join(f"{number} {direction}" for number, direction in directions if number)
    verb = "differs" if len(moved) == 1 else "differ"
    words += f"{len(moved)} {verb} by more than {SIGNIFICANT:g} standard errors ({tally})."
    return joined([label, words])


def _checkpoints(comparison: CheckpointComparison) -> Html:
    columns = [
        HtmlColumn(heading="checkpoint"),
        HtmlColumn(heading="path"),
        *(
            HtmlColumn(heading=name, kind="number")
            for name in ("scored", "mean alpha", "mean difference", f"beyond {SIGNIFICANT:g} errors")
        ),
    ]
    summary = comparison.summary
    rows = []
    for position, compared in enumerate(comparison.checkpoints):
        path = name_tag(compared.checkpoint)
        if compared.source.base is not None:
            path = joined([path, " minus ", name_tag(compared.source.base)])
        significant = f"{summary.num_significant[position]} of {summary.num_compared[position]}"
        rows.append(
            Row(
                cells=[
                    Cell(content=name_tag(compared.label)),
                    Cell(content=path, class_="long"),
                    Cell(content=f"{compared.num_scored} of {compared.num_modules}"),
                    number(summary.mean_alphas[position], ".3f"),
                    difference_column(summary.mean_differences[position] if position else None),
                    Cell(content=significant if position else DASH),
                ]
            )
        )
    return table("Differences are from the first checkpoint, over the modules scored in both", columns, rows)


def _moved_most(comparison: CheckpointComparison) -> Html:
    index = {module.name: position for position, module in enumerate(comparison.modules)}
    columns = [
        HtmlColumn(heading="module"),
        *(HtmlColumn(heading=name_tag(label), kind="number") for label in comparison.labels),
        HtmlColumn(heading="largest difference", kind="number"),
    ]
    rows = []
    for name in comparison.summary.moved_most:
        module = comparison.modules[index[name]]
        alphas = [number(None if side is None else side.alpha, ".3f") for side in module.sides]
        cells = [
            Cell(content=row_link(name, index[name]), class_="long"),
            *alphas,
            difference_column(module.largest_difference),
        ]
        rows.append(Row(cells=cells))
    return table("Alpha in each checkpoint, largest difference first", columns, rows)


def _roles(comparison: CheckpointComparison) -> Html:
    by_role = comparison.summary.by_role
    values = [alpha for row in by_role for alpha in row.mean_alphas if alpha is not None]
    ends = min(values), max(values)
    columns = [
        HtmlColumn(heading="role"),
        HtmlColumn(heading="modules", kind="number"),
        *(HtmlColumn(heading=name_tag(label), kind="number") for label in comparison.labels),
        HtmlColumn(heading="first ○ to last ●"),
    ]
    rows = [
        Row(
            cells=[
                Cell(content=name_tag(row.role)),
                Cell(content=" / ".join(map(str, row.counts)) if len(set(row.counts)) > 1 else str(row.counts[0])),
                *(number(alpha, ".3f") for alpha in row.mean_alphas),
                Cell(content=shift_glyph(row.mean_alphas[0], row.mean_alphas[-1], ends=ends)),
            ]
        )
        for row in by_role
    ]
    return table("Mean over all scored modules of the role in each checkpoint", columns, rows)


def _maps(comparison: CheckpointComparison) -> Html | None:
    """Return a map of differences for each other checkpoint, all in one scale."""
    layered = [(module, module.layer) for module in comparison.modules if module.layer is not None]
    values = [
        side.difference
        for module, _ in layered
        for side in module.sides[1 : _MAPS + 1]
        if side is not None and side.difference is not None
    ]
    if not values:
        return None
    scale = diverging(values)
    spec = "+z.3f" if scale.high < 0.1 else "+z.2f"
    first = comparison.labels[0]
    parts = []
    for position, label in enumerate(comparison.labels[1 : _MAPS + 1], start=1):
        places = []
        for module, layer in layered:
            side = module.sides[position]
            value = None if side is None else side.difference
            places.append(Place(stack=stack_of(module.name, layer), layer=layer, role=module.role, value=value))
        caption = f"Alpha in {label} minus alpha in {first}, modules of one cell averaged"
        parts.append(heat_maps(places, scale, caption=caption, spec=spec))
    legend = scale.legend(left="heavier tails than before", right="lighter", spec=spec)
    note = f"{DASH} no such module; n/s no counterpart, or not scored in both."
    return joined([tag("div", parts, class_="maps"), legend, tag("p", note, class_="note")])


def _unmatched(comparison: CheckpointComparison) -> Html:
    columns = [
        HtmlColumn(heading="module"),
        HtmlColumn(heading="in"),
        HtmlColumn(heading="shape"),
        HtmlColumn(heading="reason"),
    ]
    rows = [
        Row(
            cells=[
                Cell(content=name_tag(module.name), class_="long"),
                Cell(content=name_tag(module.checkpoint)),
                Cell(content=dimensions(module.shape), class_="shape"),
                Cell(content=module.reason),
            ]
        )
        for module in comparison.unmatched
    ]
    plural = "module" if len(rows) == 1 else "modules"
    return details(f"{len(rows)} {plural}, with reasons", table("They take no part in the comparison", columns, rows))
