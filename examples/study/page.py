"""Write every number of docs/study.md, and its figure, from the recorded runs in examples/study/results.

    python examples/study/page.py

Between `<!-- NAME -->` and `<!-- end -->` on the page stands what the function `block_NAME` returns.
Differences are those of the logarithms of the perplexities, in percent, paired by seed; negative is better.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from esdtool.comparison.paired import holm
from esdtool.comparison.power import EFFECTS, power_of
from esdtool.comparison.stopping import Look, look_at, parse_rule, planned_looks

STUDY = Path(__file__).resolve().parent
PAGE = STUDY.parents[1] / "docs" / "study.md"
FIGURE = PAGE.parent / "images" / "study-differences.png"
Line = dict[str, str]


def read(path: Path) -> list[Line]:
    """Read a CSV file with headings."""
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


RUNS = read(STUDY / "results" / "limited-runs.csv")
ALPHAS = read(STUDY / "results" / "limited-alphas.csv")
PLANS = [
    tomllib.loads((STUDY / "limited" / name).read_text(encoding="utf-8"))["sweep"]
    for name in ("decay.toml", "rates.toml")
]
EXPLORATORY = (
    ("uniform", "none", "does tuned decay pay?"),
    ("alphadecay", "none", "does AlphaDecay pay?"),
    ("mean", "uniform", "is the total of AlphaDecay well chosen?"),
    ("alphadecay", "shuffled", "is it which module gets which decay?"),
    ("alphadecay", "reversed", "is it the order by alpha?"),
    ("alphadecay-0.3", "mean-0.3", "the balance at twice the base"),
    ("alphadecay-0.3", "uniform", "AlphaDecay at twice the base"),
    ("llr", "uniform", "layer-wise learning rates (LLR)"),
    ("llr", "llr-mean", "LLR against its mean, embedding and head included"),
    ("llr", "llr-modules", "LLR's rate of embedding and head"),
)
"""Comparisons that no rule was fixed for: setting, the one that is subtracted, and the question."""
EARLIER = (
    ("final-adamw", "uniform", "none"),
    ("final-adamw", "alphadecay", "none"),
    ("final-adamw", "alphadecay", "uniform"),
    ("controls-adamw", "alphadecay", "alphadecay, control mean"),
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A comparison over common seeds, in percent."""

    first: str
    second: str
    seeds: int
    mean: float
    low: float
    high: float
    p_value: float


def perplexities(setting: str, *, column: str = "final_perplexity", sweep: str = "compare") -> dict[int, float]:
    """The results of a setting, by seed."""
    found = [line for line in RUNS if (line["sweep"], line["setting"]) == (sweep, setting) and line[column]]
    return {int(line["seed"]): float(line[column]) for line in found}


def common(first: dict[int, float], second: dict[int, float]) -> tuple[list[float], list[float]]:
    """The results of the seeds that both settings have, in order."""
    seeds = sorted(first.keys() & second.keys())
    return [first[seed] for seed in seeds], [second[seed] for seed in seeds]


def difference(first: str, second: str, ones: Sequence[float], others: Sequence[float]) -> Difference:
    """An ordinary 95 % interval and t-test, for a number of seeds that was fixed beforehand."""
    values = [100 * math.log(one / other) for one, other in zip(ones, others, strict=True)]
    test = stats.ttest_1samp(values, 0)
    interval = test.confidence_interval()
    return Difference(
        first=first,
        second=second,
        seeds=len(values),
        mean=statistics.fmean(values),
        low=float(interval.low),
        high=float(interval.high),
        p_value=float(test.pvalue),
    )


def primary() -> list[tuple[str, str, float, Look]]:
    """First, second, wanted width and last look of each comparison of the rule, at the last planned number of seeds."""
    found = []
    for plan in PLANS:
        looks = planned_looks(len(plan["seeds"]), plan["max_seeds"])
        rules = [plan["until"]] if isinstance(plan["until"], str) else plan["until"]
        for rule in map(parse_rule, rules):
            ones, others = common(perplexities(rule.first), perplexities(rule.second))
            if done := [count for count in looks if count <= len(ones)]:
                look = look_at(ones[: done[-1]], others[: done[-1]], looks)
                found.append((rule.first, rule.second, rule.width, look))
    return found


def exploratory() -> list[tuple[Difference, str]]:
    """The other comparisons that have runs."""
    found = []
    for first, second, question in EXPLORATORY:
        ones, others = common(perplexities(first), perplexities(second))
        if len(ones) > 1:
            found.append((difference(first, second, ones, others), question))
    return found


def earlier() -> list[Difference]:
    """The comparisons of the earlier study, in one pass over the text."""
    found = []
    for name, first, second in EARLIER:
        settings: dict[str, dict[int, float]] = {}
        for line in read(STUDY / "results" / f"{name}.csv"):
            control = line.get("weight_decay.control") or "none"
            label = line["policy"] if control == "none" else f"{line['policy']}, control {control}"
            settings.setdefault(label, {})[int(line["seed"])] = float(line["final_perplexity"])
        found.append(difference(first, second, *common(settings[first], settings[second])))
    return found


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A Markdown table whose first columns are words."""
    rule = [":---" if index < words else "---:" for index in range(len(headings))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def interval(low: float, high: float) -> str:
    """The ends of an interval in percent."""
    return f"{low:+.2f} to {high:+.2f} %"


def decided(look: Look, width: float) -> str:
    """What the rule says of the last look."""
    if look.width < width:
        return "decided"
    return "undecided at the maximum" if look.number == look.planned else "not at its end"


def block_answer() -> str:
    """The answer in three sentences."""
    pays = difference("uniform", "none", *common(perplexities("uniform"), perplexities("none")))
    looks = {(first, second): look for first, second, _, look in primary()}
    others = {(each.first, each.second): each for each, _ in exploratory()}
    sentences = [
        "In a LLaMA of 264 thousand parameters that sees 93 kB of text 11 times, where tuned uniform decay ends "
        f"{-pays.mean:.1f} % below none, AlphaDecay "
        f"{outcome(looks['alphadecay', 'uniform'], 'uniform decay')}, each at its best base decay of a grid; the "
        "balance between modules, by which it differs from the same total decay spread evenly, "
        f"{balance(looks['alphadecay', 'mean'])}.",
        "In one pass over text, at 1.1 million parameters and 1.3 tokens a parameter, no decay of any kind gained what "
        "five seeds could show; models of the paper's size were not tried.",
    ]
    if ("llr", "uniform") in others and ("llr-modules", "llr-modules-mean") in looks:
        rates = others["llr", "uniform"]
        sentences.insert(
            1,
            "With the same model, text and decay, layer-wise learning rates (LLR) ended "
            f"{abs(rates.mean):.1f} % {'below' if rates.mean < 0 else 'above'} uniform ones (exploratory; 95 % "
            f"interval {interval(rates.low, rates.high)}, {rates.seeds} seeds). "
            "It goes with embedding and head: without their larger rate LLR ended "
            f"{-others['llr', 'llr-modules'].mean:.1f} % higher, and the balance between weight modules alone "
            f"{balance(looks['llr-modules', 'llr-modules-mean'])}.",
        )
    return "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1))


def outcome(look: Look, other: str) -> str:
    """How a setting ended, compared with another one."""
    reach = f"(95 % interval {interval(look.low, look.high)}, {look.seeds} seeds)"
    if look.low > 0 or look.high < 0:
        return f"ended {abs(look.difference):.2f} % {'above' if look.low > 0 else 'below'} {other} {reach}"
    return f"could not be told from {other}: {look.difference:+.2f} % {reach}"


def balance(look: Look) -> str:
    """What the balance between modules did."""
    reach = f"(95 % interval {interval(look.low, look.high)}, {look.seeds} seeds)"
    if look.high < 0:
        return f"gained {-look.difference:.2f} % {reach}"
    if look.low > 0:
        return f"cost {look.difference:.2f} % {reach}"
    return f"cannot be told from chance: {look.difference:+.2f} % {reach}"


def block_regime() -> str:
    """Perplexity by uniform decay, on the seed of the search."""
    bases = ("0.3", "1", "3")
    found = {"none": perplexities("none", sweep="search")[100]}
    found |= {base: perplexities(f"uniform-base-{base}", sweep="search")[100] for base in bases}
    cells = [f"{value:.3f} ({100 * math.log(value / found['none']):+.1f} %)" for value in found.values()]
    return table(["uniform decay", "none", *bases], [["perplexity", *cells]])


def block_tuning() -> str:
    """Perplexity of the runs that chose the bases and learning rates."""
    rows = []
    for line in sorted(RUNS, key=lambda line: float(line["final_perplexity"])):
        if line["sweep"] in ("search", "tune"):
            rates = "" if line["learning_rate.policy"] == "uniform" else line["learning_rate.policy"]
            base = line["weight_decay.base"] or "-"
            policy = line["weight_decay.policy"] + (f", {rates}" if rates else "")
            rows.append([policy, base, line["optimizer.lr"], f"{float(line['final_perplexity']):.3f}"])
    return table(["policy", "base", "learning rate", "perplexity"], rows)


def block_primary() -> str:
    """The comparisons of the rule."""
    rows = []
    for first, second, width, look in primary():
        rows.append(
            [
                f"{first} - {second}",
                str(look.seeds),
                f"{look.difference:+.2f} %",
                interval(look.low, look.high),
                f"{look.width:.2f} % (wanted: {width:g} %)",
                decided(look, width),
            ]
        )
    return table(["comparison", "seeds", "difference", "95 % interval", "its width", "by the rule"], rows)


def block_settings() -> str:
    """Mean and standard error of each setting, of the final and of the averaged weights."""
    names = dict.fromkeys(line["setting"] for line in RUNS if line["sweep"] == "compare")
    rows = []
    for name in sorted(names, key=lambda name: statistics.fmean(perplexities(name).values())):
        cells = []
        for column in ("final_perplexity", "averaged_perplexity"):
            values = list(perplexities(name, column=column).values())
            error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{error}")
        decays = [float(line["mean_decay"]) for line in RUNS if (line["sweep"], line["setting"]) == ("compare", name)]
        rows.append([name, *cells, f"{statistics.fmean(decays):.2f}", str(len(perplexities(name)))])
    return table(["setting", "perplexity", "of averaged weights", "mean decay", "seeds"], rows)


def block_exploratory() -> str:
    """The other comparisons, with Holm's correction over them."""
    found = exploratory()
    corrected = holm([each.p_value for each, _ in found])
    rows = [
        [
            f"{each.first} - {each.second}",
            question,
            str(each.seeds),
            f"{each.mean:+.2f} %",
            interval(each.low, each.high),
            f"{each.p_value:.2g}",
            f"{adjusted:.2g}",
        ]
        for (each, question), adjusted in zip(found, corrected, strict=True)
    ]
    return table(["comparison", "question", "seeds", "difference", "95 % interval", "p", "p (Holm)"], rows, words=2)


def block_averaged() -> str:
    """The comparisons of the rule on the averaged weights."""
    rows = []
    for first, second, _, look in primary():
        ones, others = common(
            perplexities(first, column="averaged_perplexity"), perplexities(second, column="averaged_perplexity")
        )
        each = difference(first, second, ones[: look.seeds], others[: look.seeds])
        rows.append([f"{first} - {second}", str(each.seeds), f"{each.mean:+.2f} %", interval(each.low, each.high)])
    return table(["comparison, averaged weights", "seeds", "difference", "95 % interval"], rows)


def block_alphas() -> str:
    """Mean and spread of alpha over the modules of the final weights, by setting."""
    last = max(int(line["step"]) for line in ALPHAS)
    rows = []
    for name in dict.fromkeys(line["setting"] for line in ALPHAS if line["sweep"] == "compare"):
        found = {
            line["seed"]: line
            for line in ALPHAS
            if (line["sweep"], line["setting"], line["step"]) == ("compare", name, str(last))
        }
        cells = []
        for column in ("alpha_mean", "alpha_deviation"):
            values = [float(line[column]) for line in found.values()]
            error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{error}")
        rows.append([name, *cells, str(len(found))])
    rows.sort(key=lambda row: row[2])
    return table(["setting", "mean alpha", "spread of alpha over the modules", "seeds"], rows)


def block_power() -> str:
    """Seeds for differences, from the spread of these runs."""
    rows = []
    for first, second, _, look in primary():
        ones, others = common(perplexities(first), perplexities(second))
        found = power_of(first, second, ones[: look.seeds], others[: look.seeds])
        needed = [f"{few} ({many})" for few, many in zip(found.needed, found.needed_at_most, strict=True)]
        rows.append(
            [
                f"{first} - {second}",
                str(found.seeds),
                f"{found.deviation:.2f} %",
                f"{found.detectable:.2f} %",
                *needed,
            ]
        )
    effects = [f"seeds for {effect:g} %" for effect in EFFECTS]
    return table(["comparison", "seeds", "spread", "detectable with them", *effects], rows)


def block_earlier() -> str:
    """The earlier study."""
    rows = [
        [f"{each.first} - {each.second}", str(each.seeds), f"{each.mean:+.2f} %", interval(each.low, each.high)]
        for each in earlier()
    ]
    return table(["one pass, 1.1 million parameters", "seeds", "difference", "95 % interval"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    name.removeprefix("block_"): value for name, value in list(globals().items()) if name.startswith("block_")
}


def filled(page: str) -> str:
    """The page with every block written again."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (?!end)(\w+) -->\n(?:.*?\n)??<!-- end -->", replace, page, flags=re.DOTALL)


def draw(path: Path) -> None:
    """Paired differences with their intervals, by regime and size."""
    from esdtool.report.figures.style import BULK, new_figure, nth_style, plain, set_title

    rows = [
        (f"{first} - {second} ({look.seeds})", look.difference, look.low, look.high, 0)
        for first, second, _, look in primary()
    ]
    others = [(each, 1) for each, _ in exploratory()] + [(each, 2) for each in earlier()]
    rows += [
        (f"{each.first} - {each.second} ({each.seeds})", each.mean, each.low, each.high, kind) for each, kind in others
    ]
    kinds = (
        "little text, 0.26 million parameters: by the rule",
        "the same runs: exploratory",
        "one pass, 1.1 million parameters: exploratory",
    )
    with new_figure(path, width=7.2, height=1.6 + 0.4 * len(rows), dpi=150) as (_, (axes,)):
        axes.axvline(0, color=BULK, linewidth=1)
        named = set()
        for height, (_, mean, low, high, kind) in enumerate(reversed(rows)):
            style = nth_style(kind)
            axes.errorbar(
                mean,
                height,
                xerr=[[mean - low], [high - mean]],
                color=style["color"],
                marker=style["marker"],
                capsize=3,
                linestyle="none",
                label=None if kind in named else kinds[kind],
            )
            named.add(kind)
        axes.set_yticks(range(len(rows)), [plain(row[0]) for row in reversed(rows)])
        axes.set_xlabel("difference in perplexity, % (left is better for the first)")
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="lower center", bbox_to_anchor=(0.5, 1.08), fontsize="small")
        set_title(axes, "Paired differences (seeds in brackets), 95 % intervals")


def main() -> None:
    """Write the page and the figure."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(FIGURE)


if __name__ == "__main__":
    main()
