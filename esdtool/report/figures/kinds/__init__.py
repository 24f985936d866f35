"""Kinds of figures, one file each.

Every module of this package defines `FIGURE`, an `esdtool.report.figures.kind.FigureKind`, and is found by itself:
`heat_map.py` is `--kind heat-map`.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from esdtool.report.figures.kind import FigureKind


def _load() -> dict[str, FigureKind]:
    found = {
        module.name.replace("_", "-"): import_module(f"{__name__}.{module.name}").FIGURE
        for module in pkgutil.iter_modules(__path__)
    }
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))


FIGURES: dict[str, FigureKind] = _load()
"""All kinds by name, in the order in which they are drawn."""

KINDS = tuple(FIGURES)
"""The names of all kinds, in the order in which they are drawn."""
