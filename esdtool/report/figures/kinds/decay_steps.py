"""`decay-steps`: the range of the decays over training, all runs together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esdtool.report.figures.kind import FigureKind, FigureTarget, Material


def _draw(material: Material, target: FigureTarget) -> Iterator[Path | None]:
    from esdtool.report.figures.training import run_label, save_decay_range

    labels = [run_label(run) for run in material.runs]
    yield save_decay_range(target.path("decay-steps"), material.runs, labels, dpi=target.dpi)


FIGURE = FigureKind(
    order=80,
    summary="the range of the decays over training",
    needs="it needs a run directory with module-wise decays",
    heading="Weight decay",
    draw=_draw,
)
