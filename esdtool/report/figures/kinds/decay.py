"""`decay`: weight decay by layer and role, of assignments and of runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esdtool.report.figures.kind import FigureKind, FigureTarget, Material


def _draw(material: Material, target: FigureTarget) -> Iterator[Path | None]:
    from esdtool.report.figures.decays import decays_of_assignment, decays_of_line, save_decays
    from esdtool.report.figures.names import distinct_endings
    from esdtool.report.figures.style import short_name

    found = [
        (file, decays_of_assignment(assignment), assignment.base_weight_decay, "Weight decay by layer and role")
        for file, assignment in material.assignments
    ]
    for run in material.runs:
        line = next((line for line in reversed(run.decays) if line["modules"]), None)
        # A uniform decay is no picture.
        if line is not None and len({module["weight_decay"] for module in line["modules"].values()}) > 1:
            title = f"Weight decay by layer and role, from step {line['step']}"
            base = run.settings["weight_decay.base"]
            known = base if isinstance(base, float) else 0.0  # a predicted base stands in the run's own remarks
            found.append((str(run.path), decays_of_line(line), known, title))
    endings = distinct_endings([short_name(source).removesuffix(".json") for source, *_ in found])
    for ending, (source, decays, base, title) in zip(endings, found, strict=True):
        path = target.path(f"decay{ending}")
        yield save_decays(path, decays, base=base, title=f"{title}\n{short_name(source)}", dpi=target.dpi)


FIGURE = FigureKind(
    order=60,
    summary="weight decay by layer and role",
    needs="it needs a wd.json or a run with module-wise decays, in numbered blocks",
    heading="Last decays",
    draw=_draw,
)
