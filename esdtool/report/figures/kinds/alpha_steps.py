"""`alpha-steps`: alpha by role over training, of runs and of checkpoints of one run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esdtool.report.figures.kind import FigureKind, FigureTarget, Material


def _draw(material: Material, target: FigureTarget) -> Iterator[Path | None]:
    from esdtool.report.figures.names import distinct_endings
    from esdtool.report.figures.style import plain, short_name
    from esdtool.report.figures.training import alpha_curves, run_label, save_alpha_curves, trajectory_curves

    found = [(run_label(run), alpha_curves(run), "step") for run in material.runs]
    for trajectory in material.trajectories:
        curves, across = trajectory_curves(trajectory)
        ends = (trajectory.steps[0].checkpoint, trajectory.steps[-1].checkpoint)
        found.append((" to ".join(short_name(end) for end in ends), curves, across))
    found = [item for item in found if item[1]]
    for ending, (label, curves, across) in zip(distinct_endings([label for label, *_ in found]), found, strict=True):
        title = f"Mean α by role over training\n{plain(label)}"
        path = target.path(f"alpha-steps{ending}")
        yield save_alpha_curves(path, curves, title=title, across=across, dpi=target.dpi)


FIGURE = FigureKind(
    order=70,
    summary="alpha by role over training",
    needs="it needs a run whose policy uses alpha, or several checkpoints of one run",
    heading="Alpha by role",
    draw=_draw,
)
