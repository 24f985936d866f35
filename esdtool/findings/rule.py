"""Define a rule: how it finds something, and what a reader should know about such a finding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from esdtool.analysis.finding import Evidence, Severity
from esdtool.findings.case import Case


@dataclass(frozen=True, kw_only=True)
class Found:
    """One discovery of a rule; the words that it does not give are the rule's own."""

    severity: Severity
    modules: tuple[str, ...]
    """Names of the modules concerned."""
    evidence: tuple[Evidence, ...]
    """Measured numbers, of the clearest modules first; a few."""
    title: str | None = None
    meaning: str | None = None
    caveat: str | None = None
    action: str | None = None
    command: str | None = None
    """A command that helps; None: there is none."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule; a file of `esdtool.findings.rules` defines one as `RULE`, and the file's name names it."""

    title: str
    """The finding in a few words, as a reader meets it."""
    evidence: str
    """What is measured and from where on it counts, for the reference: sentences."""
    meaning: str
    """What such a finding usually means: a sentence or two."""
    caveat: str
    """What it does not prove: a sentence or two."""
    action: str
    """What to do: a sentence or two."""
    sources: tuple[str, ...]
    """The literature behind the measure and its limits; the project's own derivation is named so."""
    find: Callable[[Case], Iterable[Found]]
    """Looks at an analysis; it never raises for bad weights."""
    order: int = 100
    """Place among findings of one severity: what explains others comes first."""
    after: frozenset[str] = frozenset()
    """Names of rules that explain what this one would find: it does not see the modules that they found."""
