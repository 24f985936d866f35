"""The figures that a set of analyses, assignments and runs has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esdtool.analysis.document import Analysis
from esdtool.comparison.runs import Run
from esdtool.comparison.trajectory import make_trajectory
from esdtool.errors import UsageError
from esdtool.report.figures.alphas import save_difference_map, save_role_bars
from esdtool.report.figures.chosen import chosen_modules
from esdtool.report.figures.kind import FigureKind, FigureTarget, Material
from esdtool.report.figures.kinds import FIGURES
from esdtool.report.figures.names import distinct_endings
from esdtool.report.figures.style import make_folder, subject

__all__ = ["chosen_modules", "draw_figures", "save_comparison", "save_figures", "save_run_figures"]


@dataclass(frozen=True, kw_only=True)
class DrawnFigure:
    """A figure that was written."""

    name: str
    """The name of its kind."""
    kind: FigureKind
    path: Path


def save_figures(
    material: Material | Sequence[Analysis],
    folder: Path,
    *,
    kinds: Sequence[str] = (),
    suffix: str = "png",
    dpi: int = 150,
) -> list[Path]:
    """Write all figures that the material has.

    Args:
        material: what to draw, or just analyses; several analyses alone are the steps of one training run.
        folder: is made if it is missing.
        kinds: some of `KINDS`; empty for all that there is material for.
        suffix: png, svg or pdf.
        dpi: pixels per inch of PNG files.

    Returns:
        The files, in the order written. No two figures share a file.

    Raises:
        UsageError: if a figure is asked for that the material does not have, or a module that it does not have.
        OutputError: if a file cannot be written.
    """
    if not isinstance(material, Material):
        several = len(material) > 1
        material = Material(analyses=tuple(material), trajectories=(make_trajectory(material),) if several else ())
    drawn = draw_figures(material, FigureTarget(folder=folder, suffix=suffix, dpi=dpi), kinds=kinds)
    if not drawn:
        raise UsageError("nothing to draw: no module has an alpha")
    return [figure.path for figure in drawn]


def draw_figures(material: Material, target: FigureTarget, *, kinds: Sequence[str] = ()) -> list[DrawnFigure]:
    """Write all figures that the material has, and tell the kind of each.

    Args:
        material: what to draw.
        target: where and in which form; the folder is made if it is missing.
        kinds: some of `KINDS`; empty for all that there is material for.

    Raises:
        UsageError: if a figure is asked for that the material does not have, or a module that it does not have.
        OutputError: if a file cannot be written.
    """
    make_folder(target.folder)
    drawn: list[DrawnFigure] = []
    for name in kinds or FIGURES:
        kind = FIGURES[name]
        # A module's own figures need eigenvalues, which an analysis from a file lacks: an error only if asked for.
        paths = [path for path in kind.draw(material, target) if path is not None]
        if kinds and not paths:
            raise UsageError(f"no figure '{name}': {kind.needs}")
        drawn += [DrawnFigure(name=name, kind=kind, path=path) for path in paths]
    return drawn


def save_comparison(analyses: Sequence[Analysis], folder: Path, *, suffix: str = "png") -> list[Path]:
    """Draw checkpoints side by side: alpha by role, and the heat map of each one's difference from the first."""
    make_folder(folder)
    target = FigureTarget(folder=folder, suffix=suffix)
    files = [save_role_bars(target.path("roles"), analyses)]
    endings = distinct_endings([subject(analysis) for analysis in analyses[1:]])
    for ending, other in zip(endings, analyses[1:], strict=True):
        files.append(save_difference_map(target.path(f"difference{ending}"), analyses[0], other))
    return [path for path in files if path is not None]


def save_run_figures(runs: Sequence[Run], folder: Path, *, suffix: str = "png") -> list[Path]:
    """Draw runs side by side: loss, perplexity and decays over training; and of each, alpha by role and last decays."""
    return save_figures(Material(runs=tuple(runs)), folder, suffix=suffix)
