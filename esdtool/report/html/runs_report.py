"""The report of training runs: their perplexities, and their curves as pictures within the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from esdtool._version import __version__
from esdtool.comparison.leading import leading_words
from esdtool.names import role_rank
from esdtool.report.html.curves import Curve, line_chart
from esdtool.report.html.markup import DASH, Html, cut_name, joined, tag
from esdtool.report.html.page import facts, noscript, page, section
from esdtool.report.html.pictures import pictures_of
from esdtool.report.html.table import Cell, HtmlColumn, Row, number, table
from esdtool.report.tables.runs import PAIRED_HEADINGS, paired_rows
from esdtool.support.numbers import with_error

if TYPE_CHECKING:
    from esdtool.comparison.runs import ComparisonTable, Run, RunRow, SettingRow

_DRAWN = ("perplexity", "loss", "decay-steps", "alpha-steps")
"""Kinds of figures that the page draws itself; the others follow as pictures."""


_VALIDATED: tuple[tuple[Literal["perplexity", "loss"], str], ...] = (
    ("perplexity", "perplexity"),
    ("loss", "loss (nats per token)"),
)
"""What is drawn of the validation, and the title of its axis."""


def runs_page(comparison: ComparisonTable, runs: Sequence[Run]) -> str:
    """Return the comparison of runs as one HTML file that needs nothing else, not even a network.

    Args:
        comparison: of these runs.
        runs: for the curves.
    """
    parts = [
        _lead(comparison),
        noscript("Without JavaScript the tables cannot be sorted. All else is here."),
        section("By setting", _settings(comparison), anchor="settings"),
        *_differences(comparison),
        section("Runs", _runs(comparison), anchor="runs"),
        *_curves(runs),
    ]
    return page("Training runs compared", parts, None)


def _lead(comparison: ComparisonTable) -> Html:
    notes = [tag("li", note) for note in comparison.notes]
    parts = [
        tag("h1", "Training runs compared"),
        tag("p", _words(comparison), class_="lead"),
        *([tag("div", [tag("p", tag("b", "Mind that")), tag("ul", notes)], class_="bad")] if notes else []),
        facts([("runs", str(len(comparison.runs))), ("page by", f"esdtool {__version__}")]),
    ]
    return tag("header", parts)


def _words(comparison: ComparisonTable) -> Html:
    """Return the two settings with the lowest means, and whether the seeds tell them apart."""
    best, *others = comparison.settings
    words = [f"Lowest final validation perplexity: {best.policy}", _described(best), f" with {_final(best)}"]
    if others:
        second = others[0]
        words += [f"; next {second.policy}", _described(second), f" with {_final(second)}"]
        leading = leading_words(comparison)
        words += [f". {leading[:1].upper()}{leading[1:]}"]
    return joined([*words, "."])


def _described(row: SettingRow) -> str:
    return "".join(f", {key} {_text(value)}" for key, value in row.setting.items())


def _final(row: SettingRow) -> str:
    seeds = f" ({len(row.seeds)} seeds)" if len(row.seeds) > 1 else " (one seed)"
    return f"{with_error(row.final_mean, row.final_standard_error)}{seeds}"


def _keys(rows: Sequence[RunRow] | Sequence[SettingRow]) -> list[str]:
    return sorted({key for row in rows for key in row.setting})


def _settings(comparison: ComparisonTable) -> Html:
    keys = _keys(comparison.settings)
    columns = [HtmlColumn(heading=name, filter=True) for name in ("policy", *keys)]
    columns += [HtmlColumn(heading=name, kind="number") for name in ("seeds", "final", "±", "best", "mean decay")]
    rows = [
        Row(
            cells=[
                Cell(content=row.policy),
                *(Cell(content=_text(row.setting.get(key))) for key in keys),
                number(len(row.seeds), "d"),
                number(row.final_mean, ".3f"),
                number(row.final_standard_error, ".3f"),
                number(row.best_mean, ".3f"),
                number(row.mean_decay, ".3g"),
            ]
        )
        for row in comparison.settings
    ]
    caption = "Validation perplexity: mean and standard error over the seeds"
    return table(caption, columns, rows, sortable="settings", anchor="settings-table")


def _differences(comparison: ComparisonTable) -> list[Html]:
    columns = [HtmlColumn(heading=heading) for heading in PAIRED_HEADINGS]
    shown: list[Html] = []
    for title, anchor, averaged in (
        ("Final perplexity, seed by seed", "paired-table", False),
        ("Perplexity of the averaged weights, seed by seed", "averaged-table", True),
    ):
        if found := paired_rows(comparison.settings, averaged=averaged):
            rows = [Row(cells=[Cell(content=cell) for cell in cells]) for cells in found]
            shown.append(table(title, columns, rows, anchor=anchor))
    return [section("Differences", joined(shown), anchor="paired")] if shown else []


def _runs(comparison: ComparisonTable) -> Html:
    keys = _keys(comparison.runs)
    columns = [HtmlColumn(heading="run", filter=True), HtmlColumn(heading="policy", filter=True, choose="policy")]
    columns += [HtmlColumn(heading=key, filter=True) for key in keys]
    columns += [HtmlColumn(heading=name, kind="number") for name in ("seed", "step", "of", "final", "best", "best at")]
    rows = [
        Row(
            cells=[
                Cell(content=cut_name(row.run)),
                Cell(content=row.policy),
                *(Cell(content=_text(row.setting.get(key))) for key in keys),
                number(row.seed, "d"),
                number(row.step, "d"),
                number(row.steps, "d"),
                number(row.final_perplexity, ".3f"),
                number(row.best_perplexity, ".3f"),
                number(row.best_step, "d"),
            ]
        )
        for row in comparison.runs
    ]
    return table("Validation perplexity of each run", columns, rows, sortable="runs", anchor="runs-table")


def _text(value: object) -> str:
    return DASH if value is None else str(value)


def _curves(runs: Sequence[Run]) -> list[Html]:
    """Draw the curves, and show the other figures of `esdtool plot` as vector pictures, a section for each kind."""
    from esdtool.report.figures.kind import Material
    from esdtool.report.figures.training import alpha_curves, run_label

    sections = []
    for what, up in _VALIDATED:
        if chart := _validation(runs, what, up):
            sections.append(section(f"Validation {what}", chart, anchor=f"curves-{what}"))
    if chart := _decays(runs):
        sections.append(section("Weight decay", chart, anchor="curves-decay-steps"))
    alphas = [
        line_chart(
            [Curve(label=role, points=tuple(curves[role])) for role in sorted(curves, key=role_rank)],
            heading=f"Mean alpha by role: {run_label(run)}",
            across="step",
            up="mean alpha",
        )
        for run in runs
        if (curves := alpha_curves(run))
    ]
    if alphas:
        sections.append(section("Alpha by role", tag("div", alphas, class_="charts"), anchor="curves-alpha-steps"))
    pictures = pictures_of(Material(runs=tuple(runs)), leave_out=_DRAWN)
    sections += [section(heading, found, anchor=f"curves-{name}") for name, (heading, found) in pictures.items()]
    return sections


def _validation(runs: Sequence[Run], what: Literal["perplexity", "loss"], up: str) -> Html | None:
    from esdtool.report.figures.training import by_setting, mean_curve, validation_curve

    curves = []
    for label, members in by_setting(runs).items():
        lines = [validation_curve(run, what) for run in members]
        mean = mean_curve(lines)
        if mean:
            behind = tuple(tuple(line) for line in lines) if len(lines) > 1 else ()
            curves.append(Curve(label=label, points=tuple(mean), behind=behind))
    if not curves:
        return None
    heading = f"Validation {what} by setting"
    if any(curve.behind for curve in curves):
        heading += ": mean over the seeds, each seed pale behind it"
    return line_chart(curves, heading=heading, across="step", up=up)


def _decays(runs: Sequence[Run]) -> Html | None:
    from esdtool.report.figures.training import decay_ranges, run_label

    curves = [
        Curve(
            label=f"{run_label(run)} ({run.settings['weight_decay.policy']})",
            points=tuple((step, mean) for step, _, mean, _ in found),
            band=tuple((step, low, high) for step, low, _, high in found),
            holds=True,
        )
        for run in runs
        if (found := decay_ranges(run))
    ]
    if not curves:
        return None
    heading = "Weight decay: mean of the modules (line), smallest to largest (band)"
    return line_chart(curves, heading=heading, across="step", up="weight decay")
