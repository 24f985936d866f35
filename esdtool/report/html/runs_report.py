"""The report of training runs: their perplexities, and their curves as pictures within the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from esdtool._version import __version__
from esdtool.report.html.markup import DASH, Html, joined, name_tag, tag
from esdtool.report.html.page import facts, noscript, page, section
from esdtool.report.html.pictures import pictures_of
from esdtool.report.html.table import Cell, HtmlColumn, Row, number, table
from esdtool.report.tables.runs import PAIRED_HEADINGS, paired_rows

if TYPE_CHECKING:
    from esdtool.comparison.runs import ComparisonTable, Run, RunRow, SettingRow

_FIRST = ("perplexity", "loss", "decay-steps", "alpha-steps", "decay")
"""Kinds of figures that open the section on curves; any others follow in their own order."""


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
    """Return the best setting, and how far the next one is behind."""
    best, *others = comparison.settings
    words = [f"Lowest final validation perplexity: {best.policy}", _described(best), f" with {_final(best)}"]
    if others:
        second = others[0]
        behind = 100 * (second.final_mean / best.final_mean - 1)
        words += [f"; next {second.policy}", _described(second), f" with {_final(second)}, {behind:.2f} % higher"]
    return joined([*words, "."])


def _described(row: SettingRow) -> str:
    return "".join(f", {key} {_text(value)}" for key, value in row.setting.items())


def _final(row: SettingRow) -> str:
    spread = "" if row.final_standard_error is None else f" ± {row.final_standard_error:.3f}"
    seeds = f" ({len(row.seeds)} seeds)" if len(row.seeds) > 1 else " (one seed)"
    return f"{row.final_mean:.3f}{spread}{seeds}"


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
                Cell(content=name_tag(row.run)),
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
    """Show the figures of `esdtool plot` as vector pictures, a section for each kind."""
    from esdtool.report.figures.kind import Material

    found = pictures_of(Material(runs=tuple(runs)))
    order = sorted(found, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    return [section(found[name][0], found[name][1], anchor=f"curves-{name}") for name in order]
