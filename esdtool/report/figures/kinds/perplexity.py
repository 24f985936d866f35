"""`perplexity`: validation perplexity over training, by policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esdtool.report.figures.kind import FigureKind, FigureTarget, Material


def _draw(material: Material, target: FigureTarget) -> Iterator[Path | None]:
    from esdtool.report.figures.training import save_validation

    yield save_validation(target.path("perplexity"), material.runs, "perplexity", dpi=target.dpi)


FIGURE = FigureKind(
    order=91,
    summary="validation perplexity over training",
    needs="it needs a run directory of 'esdtool train'",
    heading="Validation perplexity",
    draw=_draw,
)
