"""The figure of docs/study.md: paired differences with their intervals, by regime and size."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from blocks import ACROSS, WORDS, parameters
from comparisons import SIZES, earlier, ruled

from esdtool.report.figures.style import BULK, new_figure, nth_style, plain, set_title


class Row(NamedTuple):
    """A line of the figure."""

    label: str
    mean: float
    low: float
    high: float
    kind: str


RULED, TRIED, ONCE, FORMER = (
    "by the rule",
    "little text: exploratory",
    "one pass: exploratory",
    "one pass, 1.1 million parameters: exploratory",
)


def rows() -> list[Row]:
    """What was compared by the rules, at every size, and in the earlier study; the page has the rest in tables."""
    found, decided = [], ruled()
    for each in decided:
        name = f"{WORDS[each.group.regime]}, {parameters(each.group)}: {each.rule.first} - {each.rule.second}"
        look = each.look
        found.append(Row(f"{name} ({look.seeds})", look.difference, look.low, look.high, RULED))
    for regime, groups in SIZES.items():
        for group in groups:
            for first, second in ACROSS[regime]:
                if not any((first, second, group) == (e.rule.first, e.rule.second, e.group) for e in decided):
                    one = group.difference(first, second)
                    name = f"{WORDS[regime]}, {parameters(group)}: {first} - {second} ({one.seeds})"
                    found.append(Row(name, one.mean, one.low, one.high, TRIED if regime == "limited" else ONCE))
    found += [Row(f"{e.first} - {e.second} ({e.seeds})", e.mean, e.low, e.high, FORMER) for e in earlier()]
    return found


def draw(path: Path) -> None:
    """Write the figure."""
    found = rows()
    kinds = list(dict.fromkeys(row.kind for row in found))
    with new_figure(path, width=8.4, height=1.8 + 0.3 * len(found), dpi=150) as (_, (axes,)):
        axes.axvline(0, color=BULK, linewidth=1)
        for number, kind in enumerate(kinds):
            style = nth_style(number)
            chosen = [(len(found) - 1 - place, row) for place, row in enumerate(found) if row.kind == kind]
            axes.errorbar(
                [row.mean for _, row in chosen],
                [height for height, _ in chosen],
                xerr=[[row.mean - row.low for _, row in chosen], [row.high - row.mean for _, row in chosen]],
                color=style["color"],
                marker=style["marker"],
                capsize=3,
                linestyle="none",
                label=kind,
            )
        axes.set_yticks(range(len(found)), [plain(row.label) for row in reversed(found)], fontsize="small")
        axes.set_ylim(-0.8, len(found) - 0.2)
        axes.set_xlabel("difference in perplexity, % (left is better for the first)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0 + 0.9 / len(found)), fontsize="small", ncols=2)
        set_title(axes, "Paired differences (seeds in brackets), 95 % intervals")
