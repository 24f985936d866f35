"""Write the findings at the head of the report, the gravest first."""

from __future__ import annotations

from collections.abc import Sequence

from esdtool.analysis.document import Analysis
from esdtool.analysis.finding import Finding
from esdtool.report.html.markup import Html, name_tag, tag
from esdtool.report.html.page import details
from esdtool.report.html.rows import ModuleRows
from esdtool.report.tables.findings import evidence_words, findings_of, findings_title, groups, headline

_LINKED = 24
"""Modules of a finding that are linked to their rows; the JSON names all."""

_EVIDENCE = 3


def findings_part(analysis: Analysis, rows: ModuleRows) -> Html | None:
    """Return the list of findings; None where nobody looked for any."""
    if analysis.findings is None:
        return None
    found = findings_of(analysis)
    parts = [tag("div", findings_title(found), class_="findings-title")]
    if found:
        parts.append(tag("ol", [_finding(finding, rows) for finding in found]))
    return tag("div", parts, class_="findings", role="group", aria_label="Findings")


def _finding(finding: Finding, rows: ModuleRows) -> Html:
    head = tag(
        "div",
        [
            tag("span", finding.severity.value, class_=f"severity {finding.severity.value}"),
            " ",
            tag("b", headline(finding)),
            " ",
            tag("code", finding.rule),
        ],
    )
    measured = [
        tag("li", evidence_words(evidence, finding).replace("+-", "±")) for evidence in finding.evidence[:_EVIDENCE]
    ]
    terms: list[tuple[str, Html]] = [
        ("where", tag("ul", [tag("li", name_tag(group)) for group in groups(finding)])),
        ("measured", tag("ul", measured)),
        ("it usually means", tag("span", _coded(finding.meaning))),
        ("it does not prove", tag("span", _coded(finding.caveat))),
        ("what to do", tag("span", _coded(finding.action))),
    ]
    if finding.command is not None:
        terms.append(("command", tag("code", finding.command)))
    items = [tag("div", [tag("dt", term), tag("dd", words)]) for term, words in terms]
    parts = [head, tag("dl", items, class_="terms")]
    if links := _links(finding.modules, rows):
        parts.append(links)
    return tag("li", parts)


def _coded(words: str) -> list[Html | str]:
    """Set what stands between backticks as code."""
    return [tag("code", part) if place % 2 else part for place, part in enumerate(words.split("`"))]


def _links(modules: Sequence[str], rows: ModuleRows) -> Html | None:
    known = list(dict.fromkeys(name for name in modules if name in rows.position))
    if not known:
        return None
    items = [tag("li", rows.link(name)) for name in known[:_LINKED]]
    if len(known) > _LINKED:
        items.append(tag("li", f"and {len(known) - _LINKED} more"))
    return details("The modules", tag("ul", items))
