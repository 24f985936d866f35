"""The table of all modules, and what its columns mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

from esdtool.analysis.document import Analysis
from esdtool.analysis.module_record import ModuleResult
from esdtool.analysis.verdict import OVER_TRAINED_BELOW, UNDER_TRAINED_ABOVE, Verdict, verdict, verdict_words
from esdtool.report.html.markup import Content, Html, cut_name, joined, name_tag, tag
from esdtool.report.html.page import details
from esdtool.report.html.rows import ModuleRows, anchor
from esdtool.report.html.table import Cell, HtmlColumn, Row, number, table
from esdtool.report.tables.analysis import doubt
from esdtool.report.tables.distances import DistanceColumn, distance_columns, distance_terms
from esdtool.support.words import dimensions

_CLASSES = {
    Verdict.HEAVY_TAILED: "good",
    Verdict.LIKE_RANDOM: "dull",
    Verdict.LIGHTER_THAN_RANDOM: "dull",
    Verdict.UNDER_TRAINED: "dull",
    Verdict.OVER_TRAINED: "bad",
    Verdict.NOT_SCORED: "bad",
}
"""CSS class of a verdict's cell; the words in the cell say the same."""

_LAMBDA_MAX = joined(["λ", tag("sub", "max")])


def module_table(analysis: Analysis, rows: ModuleRows) -> Html:
    """One row a module, or one for the experts of a layer."""
    fit = analysis.settings.fit
    estimated = any(module.alpha_ci for module in analysis.modules)
    doubtful = any(map(doubt, analysis.modules))
    distances = distance_columns(module.distances for module in analysis.modules)
    columns = [
        HtmlColumn(heading="module", filter=True),
        HtmlColumn(heading="alpha", kind="number"),  # beside the name: a phone shows no more
        HtmlColumn(heading="±", kind="number"),
        *([HtmlColumn(heading="slq ±", kind="number")] if estimated else []),
        *(HtmlColumn(heading=name, kind="number") for name in fit[1:]),
        HtmlColumn(heading="null", kind="number"),
        HtmlColumn(heading="role", filter=True, choose="all roles"),
        HtmlColumn(heading="layer", kind="number"),
        HtmlColumn(heading="shape", kind="number"),
        HtmlColumn(heading="dtype"),
        HtmlColumn(heading="KS", kind="number"),
        HtmlColumn(heading="stable rank", kind="number"),
        HtmlColumn(heading=_LAMBDA_MAX, kind="number"),
        *(HtmlColumn(heading=found.heading, kind="number") for found in distances),
        *([HtmlColumn(heading="identified by", filter=True)] if doubtful else []),
        HtmlColumn(heading="verdict", filter=True, choose="all verdicts"),
    ]
    body = [
        Row(cells=_cells(module, fit, distances, estimated=estimated, doubtful=doubtful), anchor=anchor(position))
        for position, module in enumerate(rows.modules)
    ]
    caption = f"Alpha by {fit[0]}"
    if len(rows.modules) < len(analysis.modules):
        caption += ", experts averaged by layer"
    return table(caption, columns, body, sortable="modules", panels=True, anchor="module-table")


def _cells(
    module: ModuleResult,
    fit: tuple[str, ...],
    distances: Sequence[DistanceColumn],
    *,
    estimated: bool,
    doubtful: bool,
) -> list[Cell]:
    judged = verdict(module, fit[0])
    return [
        Cell(content=cut_name(module.name)),
        number(module.alpha, ".3f", class_="alpha"),
        number(module.alpha_stderr, ".2f"),
        *([number(module.alpha_half_width, ".3f")] if estimated else []),
        *(number(module.alphas.get(name), ".3f") for name in fit[1:]),
        number(module.mp_alpha, ".2f"),
        Cell(content=name_tag(module.role)),
        number(module.layer, "d"),
        Cell(content=dimensions(module.shape), value=math.prod(module.shape), class_="shape"),
        Cell(content=module.dtype),
        number(module.ks_distance, ".3f"),
        number(module.stable_rank, ".1f"),
        number(module.lambda_max, ".4g"),
        *(number(found.value(module.distances), found.spec) for found in distances),
        *([Cell(content=doubt(module))] if doubtful else []),
        Cell(
            content=verdict_words(module, fit[0]),
            choice=judged.value or None,
            class_=_CLASSES.get(judged),
        ),
    ]


def glossary(analysis: Analysis) -> Html:
    """Explain the columns, closed at first."""
    fit = analysis.settings.fit
    terms: list[tuple[Content, Content]] = [
        (
            "alpha",
            f"exponent of a power law λ^-alpha fitted to the largest eigenvalues λ of WᵀW, by {fit[0]}. Small alpha: "
            "heavy tail, strong correlations among the weights.",
        ),
        (
            "±",
            "standard error of alpha, (alpha - 1) / √(eigenvalues in the tail), or by the information of the law that "
            "bounded and tpl fit; a dash: it is not known.",
        ),
    ]
    if any(module.alpha_ci for module in analysis.modules):
        terms.append(("slq ±", "half of the 95 % interval of an alpha that was estimated; a dash: it is exact."))
    if any(map(doubt, analysis.modules)):
        terms.append(
            (
                "identified by",
                "shape: nothing but a name and a shape tells that this is a matrix of the model, or that it is one.",
            )
        )
    if len(fit) > 1:
        terms.append((", ".join(fit[1:]), "alpha by the other estimators."))
    terms += [
        ("null", "alpha that an untrained, random matrix of the same shape gets (Marchenko-Pastur law)."),
        ("KS", "Kolmogorov-Smirnov distance between the tail and the fit; small is good."),
        ("stable rank", joined(["Σλ / ", _LAMBDA_MAX, ": how many directions carry the matrix."])),
        (_LAMBDA_MAX, "largest eigenvalue of WᵀW, the squared spectral norm."),
        (
            "verdict",
            "how far the spectrum is from random: the share of the squared Frobenius norm that lies elsewhere than in "
            "a random matrix of the same shape; 0 % is random, and the figure compares across shapes. The list above "
            f"the table chooses by alpha: {_verdicts(fit[0])}",
        ),
    ]
    terms += [(term, f"{words}.") for term, words in distance_terms(module.distances for module in analysis.modules)]
    items = [tag("div", [tag("dt", joined(term)), tag("dd", joined(words))]) for term, words in terms]
    return details("What the columns mean", tag("dl", items, class_="terms"))


def _verdicts(fit: str) -> str:
    if fit in ("ks", "powerlaw"):
        return (
            f"over-trained below an alpha of {OVER_TRAINED_BELOW:g}, under-trained above {UNDER_TRAINED_ABOVE:g}, "
            "heavy-tailed between."
        )
    return (
        "heavy-tailed if alpha lies more than two standard errors below the null, lighter than random if as far above "
        "it, like random between."
    )
