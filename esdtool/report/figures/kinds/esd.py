"""`esd`: the spectra of modules with their tails and their nulls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esdtool.report.figures.kind import FigureKind, FigureTarget, Material


def _draw(material: Material, target: FigureTarget) -> Iterator[Path]:
    from esdtool.report.figures.chosen import module_figures
    from esdtool.report.figures.esd import save_esd

    yield from module_figures("esd", save_esd, material, target)


FIGURE = FigureKind(
    order=10,
    summary="a module's spectrum with its tail and the untrained null",
    needs="it needs the eigenvalues: name a checkpoint, or give --esd FILE with an analysis from a file",
    draw=_draw,
    of_weights=True,
)
