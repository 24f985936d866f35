"""From an analysis to module-wise values: which modules take part, the rules, and the files that trainers read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esdtool.support.lazy import exporter

if TYPE_CHECKING:
    from esdtool.assignment.allocation import Allocation
    from esdtool.assignment.document import Assignment, Entry
    from esdtool.assignment.reading import load_allocation, load_assignment

_HOMES = {
    "Allocation": "allocation",
    "Assignment": "document",
    "Entry": "document",
    "load_allocation": "reading",
    "load_assignment": "reading",
}

__all__ = ["Allocation", "Assignment", "Entry", "load_allocation", "load_assignment"]

__getattr__ = exporter(__name__, _HOMES)
