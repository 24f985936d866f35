"""`loss`: validation loss over training, by policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esdtool.report.figures.kind import FigureKind, FigureTarget, Material


def _draw(material: Material, target: FigureTarget) -> Iterator[Path | None]:
    from esdtool.report.figures.training import save_validation

    yield save_validation(target.path("loss"), material.runs, "loss", dpi=target.dpi)


FIGURE = FigureKind(
    order=90,
    summary="validation loss over training",
    needs="it needs a run directory of 'esdtool train'",
    heading="Loss",
    draw=_draw,
)
