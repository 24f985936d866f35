"""Run all rules on an analysis, and put what they find in order."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import TopologicalSorter

from esdtool.analysis.document import Analysis
from esdtool.analysis.finding import Finding, Severity
from esdtool.errors import FindingsError
from esdtool.findings.case import Case
from esdtool.findings.grouping import grouped
from esdtool.findings.rule import Found, Rule
from esdtool.findings.rules import load_rules
from esdtool.support.words import counted, others


def diagnose(analysis: Analysis) -> Analysis:
    """Return the analysis with its findings, the gravest first.

    Rules that rest on eigenvalues or on the elements of the weights find nothing in an analysis that was read from a
    file; such an analysis keeps the findings that it has.

    Args:
        analysis: with its observations, as `esdtool.analysis.run.run` returns it.
    """
    if analysis.findings is not None and not analysis.observations:
        return analysis
    return analysis.model_copy(update={"findings": find_all(analysis)})


def fail_on_findings(analyses: Sequence[Analysis], severity: str) -> None:
    """Raise an error if one of the analyses has a finding of a severity, or a graver one.

    Args:
        analyses: with their findings.
        severity: `warning` or `error`.

    Raises:
        FindingsError: naming the checkpoint and what was found.
    """
    worst = Severity(severity).rank
    for analysis in analyses:
        grave = [finding for finding in analysis.findings or () if finding.severity.rank <= worst]
        if grave:
            names = "; ".join(f"{finding.rule} ({finding.where[0]}{others(finding.where)})" for finding in grave)
            count = counted(len(grave), "finding")
            raise FindingsError(f"{analysis.source.checkpoint}: {count} of severity {severity} or graver: {names}")


def find_all(analysis: Analysis) -> tuple[Finding, ...]:
    """Run every rule; a rule does not see the modules that rules before it have explained."""
    rules = load_rules()
    positions = {module.name: position for position, module in enumerate(analysis.modules)}
    found: dict[str, list[Finding]] = {}
    case = Case(analysis=analysis)
    for name in TopologicalSorter({name: rule.after for name, rule in rules.items()}).static_order():
        rule = rules[name]
        explained = {module for other in rule.after for finding in found[other] for module in finding.modules}
        seen = case if not explained else Case(analysis=analysis, explained=frozenset(explained))
        found[name] = [_finding(name, rule, what, positions) for what in rule.find(seen)]
    in_order = sorted(rules, key=lambda name: rules[name].order)
    return tuple(
        sorted((finding for name in in_order for finding in found[name]), key=lambda finding: finding.severity.rank)
    )


def _finding(name: str, rule: Rule, found: Found, positions: dict[str, int]) -> Finding:
    modules = tuple(sorted(found.modules, key=positions.__getitem__))
    return Finding(
        rule=name,
        severity=found.severity,
        title=found.title or rule.title,
        modules=modules,
        where=grouped(modules),
        evidence=found.evidence,
        meaning=found.meaning or rule.meaning,
        caveat=found.caveat or rule.caveat,
        action=found.action or rule.action,
        command=found.command,
    )
