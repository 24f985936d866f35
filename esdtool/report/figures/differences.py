"""Settings of training runs against uniform decay, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esdtool.comparison.runs import ComparisonTable, Run, compare_runs, described
from esdtool.report.figures.style import BULK, new_figure, nth_style, plain, set_title


def save_differences(path: Path, runs: Sequence[Run], *, dpi: int = 150) -> Path | None:
    """Final perplexity minus that of the uniform run of the same seed: a dot for each seed, mean and 95 % interval.

    None where no setting shares two seeds with uniform decay.
    """
    table = compare_runs(runs)
    rows = [row for row in reversed(table.settings) if row.paired is not None]
    if not rows:
        return None
    with new_figure(path, width=6.4, height=1.4 + 0.45 * len(rows), dpi=dpi) as (_, (axes,)):
        axes.axvline(0, color=BULK, linewidth=1)
        for height, row in enumerate(rows):
            found = row.paired
            assert found is not None
            style = nth_style(height)
            seeds = seed_differences(table, row.label, found.against)
            axes.plot(seeds, [height] * len(seeds), "o", color=style["color"], alpha=0.4, markersize=4)
            reach = [[found.difference - found.low], [found.high - found.difference]]
            axes.errorbar(
                found.difference,
                height,
                xerr=reach,
                color=style["color"],
                marker=style["marker"],
                markersize=6,
                capsize=3,
            )
        axes.set_yticks(range(len(rows)), [plain(row.label) for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        against = sorted({row.paired.against for row in rows if row.paired is not None})
        axes.set_xlabel(f"final perplexity minus that of {plain(' or '.join(against))}, same seed")
        set_title(axes, "Difference by seed (dots), mean and 95 % interval; left is better")
    return path


def seed_differences(table: ComparisonTable, label: str, against: str) -> list[float]:
    """By seed, in the order of seeds, among finished runs."""
    finals: dict[str, dict[int, float]] = {}
    for run in table.runs:
        if run.step >= run.steps:
            finals.setdefault(described(run.policy, run.setting), {})[run.seed] = run.final_perplexity
    these, others = finals.get(label, {}), finals.get(against, {})
    return [these[seed] - others[seed] for seed in sorted(these) if seed in others]
