"""`ks`: the scan of the KS distance over the start of the tail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esdtool.report.figures.kind import FigureKind, FigureTarget, Material


def _draw(material: Material, target: FigureTarget) -> Iterator[Path]:
    from esdtool.report.figures.chosen import module_figures
    from esdtool.report.figures.esd import save_ks_scan

    yield from module_figures("ks", save_ks_scan, material, target)


FIGURE = FigureKind(
    order=20,
    summary="KS distance against xmin",
    needs="it needs the eigenvalues: name a checkpoint, or give --esd FILE with an analysis from a file",
    draw=_draw,
    of_weights=True,
)
