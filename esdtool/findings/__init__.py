"""From an analysis to its findings: what is wrong in a model or worth knowing, and what to do about it.

`rules/` has one file for each rule. A rule looks at the measures of the analysis and at what was noticed about the
weights; `diagnose` runs all rules and puts the gravest findings first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esdtool.support.lazy import exporter

if TYPE_CHECKING:
    from esdtool.findings.diagnosis import diagnose
    from esdtool.findings.whole import analyze

__all__ = ["analyze", "diagnose"]

__getattr__ = exporter(__name__, {"analyze": "whole", "diagnose": "diagnosis"})
