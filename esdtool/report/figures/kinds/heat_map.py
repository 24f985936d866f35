"""`heat-map`: alpha by layer and role, a map for each checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esdtool.report.figures.kind import FigureKind, FigureTarget, Material


def _draw(material: Material, target: FigureTarget) -> Iterator[Path | None]:
    from esdtool.report.figures.alphas import save_heat_map
    from esdtool.report.figures.names import analysis_endings

    for ending, analysis in analysis_endings(material.analyses):
        yield save_heat_map(target.path(f"heat-map{ending}"), analysis, dpi=target.dpi)


FIGURE = FigureKind(
    order=30,
    summary="alpha by layer and role",
    needs="no scored module stands in a numbered block of a checkpoint or analysis",
    draw=_draw,
    of_weights=True,
)
