"""Figures of training: alpha by role over the steps, the range of the decays, loss and perplexity by policy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from esdtool.comparison.runs import Run, compare_runs, described
from esdtool.comparison.trajectory import Trajectory
from esdtool.names import role_rank
from esdtool.report.figures.decays import decays_of_line
from esdtool.report.figures.style import (
    COLOURS,
    LINES,
    legend_below,
    legend_beside,
    new_figure,
    nth_style,
    plain,
    role_styles,
    set_title,
    short_name,
)

Curve = Sequence[tuple[float, float]]


def run_label(run: Run) -> str:
    """Name a run by the end of its directory's path."""
    return short_name(str(run.path))


def alpha_curves(run: Run) -> dict[str, Curve]:
    """Mean alpha of each role at each refresh of a run."""
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in run.decays:
        values: dict[str, list[float]] = defaultdict(list)
        for decay in decays_of_line(line):
            if decay.alpha is not None:
                values[decay.role].append(decay.alpha)
        for role, alphas in values.items():
            curves[role].append((line["step"], fmean(alphas)))
    return dict(curves)


def trajectory_curves(trajectory: Trajectory) -> tuple[dict[str, Curve], str]:
    """Mean alpha of each role over several checkpoints, and what the horizontal axis is."""
    steps = [step.step for step in trajectory.steps]
    numbered = None not in steps and len(set(steps)) == len(steps)
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for index, step in enumerate(trajectory.steps, start=1):
        place = step.step if numbered and step.step is not None else index
        for role, alpha in step.alpha_by_role.items():
            curves[role].append((place, alpha))
    return dict(curves), "step" if numbered else "checkpoint"


def save_alpha_curves(
    path: Path, curves: Mapping[str, Curve], *, title: str, across: str = "step", dpi: int = 150
) -> Path | None:
    """Alpha by role over training; None without an alpha."""
    if not curves:
        return None
    styles = role_styles(sorted(curves, key=role_rank))
    with new_figure(path, width=7.2, height=4.0, dpi=dpi) as (figure, (axes,)):
        for role, style in styles.items():
            axes.plot(*zip(*curves[role], strict=True), label=plain(role), **style)
        axes.set_xlabel(across)
        axes.set_ylabel("mean α (smaller: heavier tail)")
        set_title(axes, title)
        legend_beside(figure, axes)
    return path


def decay_ranges(run: Run) -> list[tuple[float, float, float, float]]:
    """(step, smallest, mean, largest) decay of the modules at each refresh and at the end; none without decays."""
    found: list[tuple[float, float, float, float]] = []
    for line in run.decays:
        values = [module["weight_decay"] for module in line["modules"].values()]
        if values:
            found.append((line["step"], min(values), fmean(values), max(values)))
    if found:
        # A decay holds until the next refresh, the last one until the end.
        step, *values = found[-1]
        found.append((max(run.steps_done, step), *values))
    return found


def save_decay_range(path: Path, runs: Sequence[Run], labels: Sequence[str], *, dpi: int = 150) -> Path | None:
    """Smallest, mean and largest decay of the modules over training, a colour a run; None without such decays."""
    shown = [(index, run, found) for index, run in enumerate(runs) if (found := decay_ranges(run))]
    if not shown:
        return None
    with new_figure(path, width=7.2, height=4.0, dpi=dpi) as (figure, (axes,)):
        for index, run, found in shown:
            steps, lows, means, highs = zip(*found, strict=True)
            colour = COLOURS[index % len(COLOURS)]
            axes.fill_between(steps, lows, highs, step="post", color=colour, alpha=0.18, linewidth=0)
            axes.step(
                steps,
                means,
                where="post",
                color=colour,
                linestyle=LINES[index // len(COLOURS) % len(LINES)],
                label=plain(f"{labels[index]} ({run.settings['weight_decay.policy']})"),
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("weight decay of the modules")
        set_title(axes, "Weight decay over training: mean of the modules (line), smallest to largest (band)")
        legend_below(figure, axes)
    return path


def save_validation(
    path: Path, runs: Sequence[Run], what: Literal["loss", "perplexity"], *, dpi: int = 150
) -> Path | None:
    """Validation loss or perplexity over training by policy: the mean over seeds, and each seed paler behind it.

    With the loss of one run each, the training loss stands behind it in place of the seeds.
    """
    groups = by_setting(runs)
    if not groups:
        return None
    with new_figure(path, width=7.2, height=4.2, dpi=dpi) as (figure, (axes,)):
        for index, (label, members) in enumerate(groups.items()):
            style = nth_style(index)
            pale = {"color": style["color"], "alpha": 0.35, "linewidth": 0.9}
            for run in members:
                if what == "loss" and len(members) == 1:
                    train = [(line["step"], line["loss"]) for line in run.metrics if line["split"] == "train"]
                    finite = [point for point in train if point[1] is not None]
                    if finite:
                        axes.plot(*zip(*finite, strict=True), **pale)
                elif len(members) > 1:
                    axes.plot(*zip(*validation_curve(run, what), strict=True), **pale)
            mean = mean_curve([validation_curve(run, what) for run in members])
            axes.plot(*zip(*mean, strict=True), label=plain(label), **style)
        if what == "perplexity":
            _plain_log_scale(axes)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)" if what == "loss" else "perplexity")
        title = f"Validation {what} by policy"
        if any(len(members) > 1 for members in groups.values()):
            title += ": mean over seeds (marked), each seed (pale)"
        elif what == "loss":
            title += " (marked), training loss (pale)"
        set_title(axes, title)
        legend_below(figure, axes)
    return path


def by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ only in the seed, under the words that tell the settings apart."""
    if not runs:
        return {}
    groups: dict[str, list[Run]] = {}
    for run, row in zip(runs, compare_runs(runs).runs, strict=True):
        groups.setdefault(described(row.policy, row.setting), []).append(run)
    return {
        f"{label} ({len(members)} seeds)" if len(members) > 1 else label: members for label, members in groups.items()
    }


def validation_curve(run: Run, what: Literal["loss", "perplexity"]) -> Curve:
    """Validation loss or perplexity over the steps."""
    lines = run.validation
    return [(line["step"], line["loss"] if what == "loss" else math.exp(min(line["loss"], 700.0))) for line in lines]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean where all have a value."""
    values: dict[float, list[float]] = defaultdict(list)
    for curve in curves:
        for step, value in curve:
            values[step].append(value)
    return [(step, fmean(found)) for step, found in sorted(values.items()) if len(found) == len(curves)]


def _plain_log_scale(axes: Axes) -> None:
    """A logarithmic axis with numbers that people read: 20, 50, 100, or 22, 24, 26 where it covers less."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(
        LogLocator(base=10, subs=(1.0, 2.0, 5.0)) if high > 10 * low else MaxNLocator(nbins=6, steps=[1, 2, 5, 10])
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
