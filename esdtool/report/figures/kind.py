"""Define a kind of figure: what it shows, what it needs, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the help names all figures, and must not wait for the documents' models
    from esdtool.analysis.document import Analysis
    from esdtool.assignment.document import Assignment
    from esdtool.comparison.runs import Run
    from esdtool.comparison.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Material:
    """The analyses, assignments and runs to draw."""

    analyses: tuple[Analysis, ...] = ()
    trajectories: tuple[Trajectory, ...] = ()
    assignments: tuple[tuple[str, Assignment], ...] = ()
    """(file, assignment)."""
    runs: tuple[Run, ...] = ()
    modules: tuple[str, ...] = ()
    """Regular expressions: draw the ESDs of these modules, not of the heaviest, the middle and the lightest tail."""


@dataclass(frozen=True, kw_only=True)
class FigureTarget:
    """The folder and the format of the figures."""

    folder: Path
    suffix: str = "png"
    dpi: int = 150
    """Pixels per inch of a PNG."""

    def path(self, name: str) -> Path:
        """Return the file for a figure of this name."""
        return self.folder / f"{name}.{self.suffix}"


@dataclass(frozen=True, kw_only=True)
class FigureKind:
    """One kind of figure; a file of `esdtool.report.figures.kinds` defines one as `FIGURE`, and its name names it."""

    summary: str
    """What it shows, for the help of `--kind`."""
    needs: str
    """What it needs, for the error when a source does not have it."""
    draw: Callable[[Material, FigureTarget], Iterable[Path | None]]
    """Draws every figure of the kind that the material has; a None stands for one that there is nothing to draw for.

    matplotlib is to be imported when it draws: the command line imports all kinds for its help.
    """
    heading: str | None = None
    """Title of its section in the HTML comparison of runs; None for the summary."""
    of_weights: bool = False
    """Whether it shows the weights of a checkpoint: for a training run its final or newest checkpoint is taken."""
    order: int = 100
    """Place among the figures; those of one place stand by the alphabet."""
