"""`differences`: runs against uniform decay, seed by seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esdtool.report.figures.kind import FigureKind, FigureTarget, Material


def _draw(material: Material, target: FigureTarget) -> Iterator[Path | None]:
    from esdtool.report.figures.differences import save_differences

    if material.runs:
        yield save_differences(target.path("differences"), material.runs, dpi=target.dpi)


FIGURE = FigureKind(
    order=95,
    summary="runs against uniform decay, seed by seed",
    needs="it needs runs with uniform decay and with another policy, with at least two common seeds",
    heading="Against uniform decay, seed by seed",
    draw=_draw,
)
