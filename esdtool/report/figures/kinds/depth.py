"""`depth`: alpha by depth, a line a role, a figure for each checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esdtool.report.figures.kind import FigureKind, FigureTarget, Material


def _draw(material: Material, target: FigureTarget) -> Iterator[Path | None]:
    from esdtool.report.figures.alphas import save_depth
    from esdtool.report.figures.names import analysis_endings

    for ending, analysis in analysis_endings(material.analyses):
        yield save_depth(target.path(f"depth{ending}"), analysis, dpi=target.dpi)


FIGURE = FigureKind(
    order=40,
    summary="alpha by depth",
    needs="it needs a checkpoint or analysis with at least two numbered blocks",
    draw=_draw,
    of_weights=True,
)
