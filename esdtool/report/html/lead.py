"""Write the opening of the report: the conclusion, and what was analysed how."""

from __future__ import annotations

from esdtool._version import __version__
from esdtool.analysis.document import Analysis, Settings
from esdtool.analysis.verdict import conclude
from esdtool.report.html.findings import findings_part
from esdtool.report.html.markup import Content, Html, joined, name_tag, tag
from esdtool.report.html.page import details, facts
from esdtool.report.html.rows import ModuleRows
from esdtool.report.tables.settings import settings_in_words

_FILES = 8
"""More are told by their number."""


def subject(analysis: Analysis) -> str:
    """Name what was analysed, for titles."""
    source = analysis.source
    return source.checkpoint if source.base is None else f"{source.checkpoint} minus {source.base}"


def lead(analysis: Analysis, rows: ModuleRows) -> Html:
    """Return the heading, the findings, and a header with the conclusion and the facts."""
    heading = tag("h1", [tag("span", "Spectral analysis of ", class_="kind"), name_tag(subject(analysis))])
    found = findings_part(analysis, rows)
    parts: list[Html] = [*_verdict(analysis, rows), facts(_facts(analysis))]
    parts.append(details("Settings", facts(_settings(analysis.settings))))
    return joined([heading, *([] if found is None else [found]), tag("header", parts)])


def _verdict(analysis: Analysis, rows: ModuleRows) -> list[Html]:
    conclusion = conclude(analysis)
    parts = [tag("p", conclusion.opening, class_="lead")]
    if conclusion.heaviest:
        parts.append(_extremes("Heaviest tails", conclusion.heaviest, rows))
    if conclusion.lightest:
        parts.append(_extremes("Lightest", conclusion.lightest, rows))
    return parts


def _extremes(words: str, modules: tuple[tuple[str, float], ...], rows: ModuleRows) -> Html:
    content: list[str] = [tag("b", f"{words}: ")]
    for position, (name, alpha) in enumerate(modules):
        content += [", " if position else "", rows.link(name), f" ({alpha:.2f})"]
    return tag("p", content)


def _facts(analysis: Analysis) -> list[tuple[str, Content]]:
    source = analysis.source
    pairs: list[tuple[str, Content]] = []
    if source.base is not None:  # without one the heading says it all
        pairs += [("checkpoint", name_tag(source.checkpoint)), ("minus base", name_tag(source.base))]
    if source.merged_with is not None:
        pairs.append(("merged into", name_tag(source.merged_with)))
    if source.revision is not None:
        pairs.append(("revision", name_tag(source.revision)))
    if source.model_type is not None:
        pairs.append(("model type", name_tag(source.model_type)))
    pairs.append(("alpha by", _words(analysis.settings.fit)))
    pairs.append(("modules", f"{analysis.summary.num_scored} scored of {analysis.summary.num_modules}"))
    pairs.append(("tensors skipped", str(analysis.summary.num_skipped)))
    if source.files:
        names = [tag("li", name_tag(name)) for name in source.files[:_FILES]]
        if len(source.files) > _FILES:
            names.append(tag("li", f"and {len(source.files) - _FILES} more"))
        pairs.append(("files" if len(source.files) > 1 else "file", tag("ul", names)))
    pairs.append(("analysed by", analysis.created_by))
    if analysis.created_by != f"esdtool {__version__}":
        pairs.append(("page by", f"esdtool {__version__}"))
    return pairs


def _settings(settings: Settings) -> list[tuple[str, Content]]:
    return [
        (
            setting.term,
            joined(tag("div", tag("code", value) if setting.is_code else value) for value in setting.values),
        )
        for setting in settings_in_words(settings)
    ]


def _words(names: tuple[str, ...]) -> str:
    return ", ".join(names)
