"""Findings as short lines, the same in the terminal, in Markdown and in HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esdtool.analysis.document import Analysis
from esdtool.analysis.finding import Evidence, Finding, Severity
from esdtool.support.words import counted

_GROUPS = 4
"""Groups of modules that are named; the JSON has all."""

_EVIDENCE = 3
"""Numbers that are shown; the JSON has all."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One labelled line below a finding's title."""

    label: str
    text: str
    is_code: bool = False


def findings_title(findings: Sequence[Finding]) -> str:
    """Count the findings by their severity.

    >>> findings_title([])
    'Findings: none'
    """
    counts = Counter(finding.severity for finding in findings)
    nouns = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "remark"}
    parts = [counted(counts[severity], noun) for severity, noun in nouns.items() if counts[severity]]
    return f"Findings: {', '.join(parts) or 'none'}"


def findings_of(analysis: Analysis) -> tuple[Finding, ...]:
    """Return the findings of an analysis; none where nobody looked."""
    return analysis.findings or ()


def headline(finding: Finding) -> str:
    """Say what was found, and on how many modules."""
    return f"{finding.title} ({counted(len(finding.modules), 'module')})"


def groups(finding: Finding) -> list[str]:
    """Name the groups of modules that are shown, and say how many are not."""
    shown = list(finding.where[:_GROUPS])
    rest = len(finding.where) - len(shown)
    return [*shown, f"and {rest} more groups"] if rest > 1 else list(finding.where[: _GROUPS + 1])


def evidence_words(evidence: Evidence, finding: Finding) -> str:
    """Say one number of the evidence, with the module unless the finding has only that one."""
    named = evidence.module is not None and len(finding.modules) > 1
    return f"{evidence.module}: {evidence.words}" if named else evidence.words


def lines(finding: Finding) -> Iterable[Line]:
    """Yield what stands below a finding's title."""
    yield Line(label="where", text=", ".join(groups(finding)))
    measured = [evidence_words(evidence, finding) for evidence in finding.evidence[:_EVIDENCE]]
    yield Line(label="measured", text="; ".join(measured))
    yield Line(label="usually", text=finding.meaning)
    yield Line(label="not proven", text=finding.caveat)
    yield Line(label="to do", text=finding.action)
    if finding.command is not None:
        yield Line(label="command", text=finding.command, is_code=True)
