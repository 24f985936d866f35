"""From a checkpoint to its analysis: the plan, its execution, and the document that holds the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esdtool.support.lazy import exporter

if TYPE_CHECKING:
    from esdtool.analysis.document import Analysis, Settings, Source, Summary
    from esdtool.analysis.module_record import ModuleResult
    from esdtool.analysis.run import analyze

__all__ = ["Analysis", "ModuleResult", "Settings", "Source", "Summary", "analyze"]

__getattr__ = exporter(
    __name__,
    dict.fromkeys(["Analysis", "Settings", "Source", "Summary"], "document")
    | {"ModuleResult": "module_record", "analyze": "run"},
)
