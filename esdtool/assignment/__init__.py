"""From an analysis to module-wise values: which modules take part, the rule, and the document that trainers read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esdtool.support.lazy import exporter

if TYPE_CHECKING:
    from esdtool.assignment.document import Assignment, Entry, load_assignment

__all__ = ["Assignment", "Entry", "load_assignment"]

__getattr__ = exporter(__name__, dict.fromkeys(__all__, "document"))
