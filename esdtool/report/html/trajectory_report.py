"""The report of a run that is followed: trajectories of alpha, and the findings in the last checkpoint."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from esdtool._version import __version__
from esdtool.names import role_rank
from esdtool.report.html.curves import Curve, line_chart
from esdtool.report.html.markup import Html, name_tag, tag
from esdtool.report.html.page import facts, noscript, page, section
from esdtool.report.html.pictures import pictures_of
from esdtool.report.html.table import Cell, HtmlColumn, Row, number, table
from esdtool.report.tables.findings import findings_of, findings_title, headline

if TYPE_CHECKING:
    from esdtool.analysis.document import Analysis
    from esdtool.analysis.finding import Finding
    from esdtool.comparison.trajectory import Trajectory


def trajectory_page(trajectory: Trajectory, *, refresh: int | None = None) -> str:
    """Return the checkpoints of one run as one HTML file that needs nothing else, not even a network.

    Args:
        trajectory: at least one checkpoint.
        refresh: seconds after which a browser reads the file again, while the run goes on; None: never.
    """
    last = trajectory.analyses[-1]
    parts = [
        _lead(trajectory),
        noscript("Without JavaScript the table cannot be sorted. All else is here."),
        *([section("Findings", _findings(last), anchor="findings")] if last.findings is not None else []),
        *_curves(trajectory),
        section("Checkpoints", _checkpoints(trajectory), anchor="checkpoints"),
    ]
    return page("Checkpoints of a run", parts, None, refresh=refresh)


def _lead(trajectory: Trajectory) -> Html:
    first, last = trajectory.steps[0], trajectory.steps[-1]
    words = f"{len(trajectory.steps)} checkpoint" + ("s" if len(trajectory.steps) > 1 else "")
    if first.mean_alpha is not None and last.mean_alpha is not None:
        words += f". Mean alpha {first.mean_alpha:.3f}"
        if len(trajectory.steps) > 1:
            words += f" in the first, {last.mean_alpha:.3f} in the last"
    return tag(
        "header",
        [
            tag("h1", "Checkpoints of a run"),
            tag("p", f"{words}.", class_="lead"),
            facts([("last", name_tag(last.checkpoint)), ("page by", f"esdtool {__version__}")]),
        ],
    )


def _findings(analysis: Analysis) -> list[Html]:
    found = findings_of(analysis)
    title = tag("p", f"{findings_title(found)} in {PurePath(analysis.source.checkpoint).name}.")
    return [title, *([tag("ul", [tag("li", _line(each)) for each in found])] if found else [])]


def _line(finding: Finding) -> list[Html | str]:
    return [tag("b", f"{finding.severity.value} {finding.rule}: "), headline(finding)]


def _curves(trajectory: Trajectory) -> list[Html]:
    from esdtool.report.figures.kind import Material
    from esdtool.report.figures.training import trajectory_curves

    if len(trajectory.steps) < 2:
        return []
    curves, across = trajectory_curves(trajectory)
    sections = []
    if curves:
        lines = [Curve(label=role, points=tuple(curves[role])) for role in sorted(curves, key=role_rank)]
        chart = line_chart(lines, heading="Mean alpha of each role", across=across, up="mean alpha")
        sections.append(section("Alpha by role", chart, anchor="curves-alpha-steps"))
    found = pictures_of(Material(trajectories=(trajectory,)), leave_out=("alpha-steps",))
    sections += [section(heading, pictures, anchor=f"curves-{name}") for name, (heading, pictures) in found.items()]
    return sections


def _checkpoints(trajectory: Trajectory) -> Html:
    columns = [HtmlColumn(heading="checkpoint"), HtmlColumn(heading="step", kind="number")]
    columns += [HtmlColumn(heading=name, kind="number") for name in ("mean", *trajectory.roles)]
    columns.append(HtmlColumn(heading="findings"))
    rows = [
        Row(
            cells=[
                Cell(content=name_tag(step.checkpoint)),
                number(step.step, "d"),
                number(step.mean_alpha, ".3f"),
                *(number(step.alpha_by_role.get(role), ".3f") for role in trajectory.roles),
                Cell(content=", ".join(dict.fromkeys(each.rule for each in findings_of(analysis)))),
            ]
        )
        for step, analysis in zip(trajectory.steps, trajectory.analyses, strict=True)
    ]
    return table("Mean alpha of each role", columns, rows, sortable="checkpoints", anchor="checkpoints-table")
