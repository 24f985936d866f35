"""The report of training runs: their perplexities, and their curves as pictures within the page."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from esdtool._version import __version__
from esdtool.report.html.markup import DASH, Html, joined, name_tag, tag
from esdtool.report.html.page import facts, noscript, page, section
from esdtool.report.html.table import Cell, Column, Row, number, table
from esdtool.report.tables.runs import PAIRED_HEADINGS, paired_rows

if TYPE_CHECKING:
    from esdtool.comparison.runs import ComparisonTable, Run, RunRow, SettingRow

_CURVES = (
    ("perplexity", "Validation perplexity"),
    ("loss", "Loss"),
    ("decay-steps", "Weight decay"),
    ("alpha-steps", "Alpha by role"),
    ("decay", "Last decays"),
    ("differences", "Against uniform decay, seed by seed"),
)
"""Kinds of figures, and their headings."""


def runs_page(comparison: ComparisonTable, runs: Sequence[Run]) -> str:
    """The comparison of runs as one HTML file that needs nothing else, not even a network.

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
    """The best setting, and how far the next one is behind."""
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
    columns = [Column(heading=name, filter=True) for name in ("policy", *keys)]
    columns += [Column(heading=name, kind="number") for name in ("seeds", "final", "±", "best", "mean decay")]
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
    found = paired_rows(comparison.settings)
    if not found:
        return []
    columns = [Column(heading=heading) for heading in PAIRED_HEADINGS]
    rows = [Row(cells=[Cell(content=cell) for cell in cells]) for cells in found]
    shown = table("Final perplexity, seed by seed", columns, rows, anchor="paired-table")
    return [section("Differences", shown, anchor="paired")]


def _runs(comparison: ComparisonTable) -> Html:
    keys = _keys(comparison.runs)
    columns = [Column(heading="run", filter=True), Column(heading="policy", filter=True, choose="policy")]
    columns += [Column(heading=key, filter=True) for key in keys]
    columns += [Column(heading=name, kind="number") for name in ("seed", "step", "of", "final", "best", "best at")]
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
    """The figures of `esdtool plot`, as vector pictures."""
    from esdtool.report.figures import save_run_figures

    with tempfile.TemporaryDirectory() as folder:
        files = save_run_figures(runs, Path(folder), suffix="svg")
        drawn = [(path.stem, path.read_bytes()) for path in files]
    sections = []
    for kind, heading in _CURVES:
        of_kind = [(name, content) for name, content in drawn if _kind_of(name) == kind]
        if of_kind:
            pictures = [_picture(content, f"{heading}: {name}") for name, content in of_kind]
            sections.append(section(heading, pictures, anchor=f"curves-{kind}"))
    return sections


def _kind_of(name: str) -> str:
    """The kind of a figure's file, which may end in the run that it is of."""
    return next(kind for kind, _ in sorted(_CURVES, key=lambda item: -len(item[0])) if name.startswith(kind))


def _picture(content: bytes, words: str) -> Html:
    address = f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
    return tag("img", src=address, alt=words, class_="curves")
