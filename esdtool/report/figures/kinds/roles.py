"""`roles`: mean alpha by role, all checkpoints side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esdtool.report.figures.kind import FigureKind, FigureTarget, Material


def _draw(material: Material, target: FigureTarget) -> Iterator[Path | None]:
    from esdtool.report.figures.alphas import save_role_bars

    if material.analyses:
        yield save_role_bars(target.path("roles"), material.analyses, dpi=target.dpi)


FIGURE = FigureKind(
    order=50,
    summary="mean alpha by role",
    needs="it needs a checkpoint or an analysis with a scored module",
    draw=_draw,
    of_weights=True,
)
