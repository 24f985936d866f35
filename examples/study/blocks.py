"""What docs/study.md says in numbers: a function `block_NAME` for each place `<!-- NAME -->` of the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import comparisons
from comparisons import AVERAGED, LIMITED, ONE_PASS, SIZES, Difference, Group, earlier, ruled

from esdtool.comparison.paired import holm
from esdtool.comparison.power import EFFECTS, power_of

WORDS = {"limited": "little text", "onepass": "one pass"}
"""What the page calls the regimes."""
FAMILIES = {
    "decays": (
        ("uniform", "none", "does tuned decay pay?"),
        ("alphadecay", "none", "does AlphaDecay pay?"),
        ("mean", "uniform", "is the total of AlphaDecay well chosen?"),
        ("mean-0.6", "uniform", "the same with the base tuned again"),
        ("alphadecay-0.6", "shuffled-0.6", "is it which module gets which decay?"),
        ("alphadecay-0.6", "reversed-0.6", "is it the order by alpha?"),
        ("awd", "uniform", "AWD"),
        ("adadecay", "uniform", "AdaDecay"),
        ("uniform-everywhere", "uniform", "decay of embeddings, head and norms too"),
        ("alphadecay-everywhere", "uniform-everywhere", "AlphaDecay, with those decaying at the base"),
    ),
    "rates": (
        ("llr", "uniform", "layer-wise learning rates (LLR)"),
        ("llr", "llr-mean", "LLR against its mean, embedding and head included"),
        ("llr", "llr-shuffled", "is it which module gets which rate?"),
        ("llr", "llr-reversed", "is it the order by alpha?"),
        ("llr", "llr-modules", "LLR's rate of embedding and head"),
        ("uniform-ends", "uniform", "that rate alone, without LLR"),
        ("llr", "uniform-ends", "LLR beyond that rate"),
        ("both", "llr", "AlphaDecay beside LLR"),
    ),
    "adam": (
        ("adam-uniform", "none", "does L2 decay pay?"),
        ("adam-alphadecay", "none", "does AlphaDecay as L2 pay?"),
        ("adam-alphadecay", "adam-uniform", "AlphaDecay against uniform L2"),
        ("adam-uniform", "uniform", "L2 against decoupled decay"),
    ),
}
"""Comparisons with little text that no rule was fixed for: setting, the one that is subtracted, and the question."""
RATES = (("llr", "uniform"), ("uniform-ends", "uniform"), ("llr", "uniform-ends"))
ACROSS = {
    "limited": (("uniform", "none"), ("alphadecay-0.6", "mean-0.6"), ("alphadecay-0.6", "uniform")),
    "onepass": (("uniform", "none"), ("alphadecay", "mean"), ("alphadecay", "uniform"), *RATES),
}
"""What is compared at every size of a regime."""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A Markdown table whose first columns are words."""
    rule = [":---" if index < words else "---:" for index in range(len(headings))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def interval(low: float, high: float) -> str:
    """The ends of an interval in percent."""
    return f"{low:+.2f} to {high:+.2f} %"


def parameters(group: Group) -> str:
    """The size of a group's model, in thousands."""
    return f"{group.parameters() / 1000:.0f} thousand"


def cells(each: Difference) -> list[str]:
    """Seeds, difference and interval of a comparison."""
    return [str(each.seeds), f"{each.mean:+.2f} %", interval(each.low, each.high)]


def exploratory(family: str) -> str:
    """The comparisons of a family, with Holm's correction over them."""
    found = [(LIMITED.difference(first, second), question) for first, second, question in FAMILIES[family]]
    corrected = holm([each.p_value for each, _ in found])
    rows = [
        [f"{each.first} - {each.second}", question, *cells(each), f"{each.p_value:.2g}", f"{adjusted:.2g}"]
        for (each, question), adjusted in zip(found, corrected, strict=True)
    ]
    return table(["comparison", "question", "seeds", "difference", "95 % interval", "p", "p (Holm)"], rows, words=2)


def block_decays() -> str:
    """Exploratory comparisons of decays."""
    return exploratory("decays")


def block_rates() -> str:
    """Exploratory comparisons of learning rates."""
    return exploratory("rates")


def block_adam() -> str:
    """Exploratory comparisons with Adam."""
    return exploratory("adam")


def searched(group: Group) -> str:
    """Perplexity by uniform decay, on the seed of the search."""
    found = {
        line["weight_decay.base"] or "none": float(line[comparisons.FINAL])
        for line in Group(regime=group.regime, sweep="search").lines()
        if not line["setting"].startswith("lr-")
    }
    bases = ["none", *sorted(found.keys() - {"none"}, key=float)]
    headings = ["none", *(f"{float(base):g}" for base in bases[1:])]
    row = [f"{found[base]:.3f} ({100 * math.log(found[base] / found['none']):+.1f} %)" for base in bases]
    return table(["uniform decay", *headings], [["perplexity", *row]])


def block_regime() -> str:
    """Perplexity by uniform decay with little text."""
    return searched(LIMITED)


def block_onepass() -> str:
    """Perplexity by uniform decay in one pass."""
    return searched(ONE_PASS)


def block_retuned() -> str:
    """Perplexity by base over the seed that chose and those that were added."""
    rows, more = [], Group(regime="limited", sweep="retune")
    for policy, sweep in (("uniform", "search"), ("alphadecay", "tune")):
        for setting in more.settings():
            if not setting.startswith(f"{policy}-"):
                continue
            first = Group(regime="limited", sweep=sweep).perplexities(setting)
            found = first | more.perplexities(setting)
            base = setting.rpartition("-")[2]
            rows.append([policy, base, f"{first[100]:.3f}", with_error(list(found.values())), str(len(found))])
    return table(["policy", "base", "seed 100", "all", "seeds"], rows)


def block_tuning() -> str:
    """Perplexity of the runs that chose bases and learning rates, best first."""
    rows = []
    for group in ("limited", "onepass"):
        lines = [line for line in comparisons.RUNS if line["regime"] == group and line["sweep"] in ("search", "tune")]
        for line in sorted(lines, key=lambda line: float(line[comparisons.FINAL])):
            optimizer = "" if line["optimizer.name"] == "adamw" else f"{line['optimizer.name']}, "
            rates = {"uniform": "", "file": ", embedding and head x 5"}.get(
                line["learning_rate.policy"], f", {line['learning_rate.policy']}"
            )
            policy = optimizer + line["weight_decay.policy"] + rates
            base = f"{float(line['weight_decay.base']):g}" if line["weight_decay.base"] else "-"
            rows.append([WORDS[group], policy, base, line["optimizer.lr"], f"{float(line[comparisons.FINAL]):.3f}"])
    return table(["regime", "policy", "base", "learning rate", "perplexity"], rows, words=2)


def block_primary() -> str:
    """The comparisons of the rules."""
    rows = [
        [
            WORDS[each.group.regime],
            f"{each.rule.first} - {each.rule.second}",
            str(each.look.seeds),
            f"{each.look.difference:+.2f} %",
            interval(each.look.low, each.look.high),
            f"{each.look.width:.2f} % (wanted: {each.rule.width:g} %)",
            each.decision,
        ]
        for each in ruled()
    ]
    headings = ["regime", "comparison", "seeds", "difference", "95 % interval", "its width", "by the rule"]
    return table(headings, rows, words=2)


def block_averaged() -> str:
    """The comparisons of the rules on the averaged weights."""
    rows = []
    for each in ruled():
        found = each.group.difference(each.rule.first, each.rule.second, column=AVERAGED, seeds=each.look.seeds)
        rows.append([WORDS[each.group.regime], f"{found.first} - {found.second}", *cells(found)])
    return table(["regime", "comparison, averaged weights", "seeds", "difference", "95 % interval"], rows, words=2)


def with_error(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard error."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"


def block_settings() -> str:
    """Mean and standard error of each setting, of the final and of the averaged weights."""
    rows = []
    for group in (LIMITED, ONE_PASS):
        names = group.settings()
        for name in sorted(names, key=lambda name: statistics.fmean(group.perplexities(name).values())):
            results = [
                with_error(list(group.perplexities(name, column=column).values()))
                for column in (comparisons.FINAL, AVERAGED)
            ]
            decay = statistics.fmean(float(line["mean_decay"]) for line in group.lines(name))
            rows.append([WORDS[group.regime], name, *results, f"{decay:.2g}", str(len(group.lines(name)))])
    headings = ["regime", "setting", "perplexity", "of averaged weights", "mean decay", "seeds"]
    return table(headings, rows, words=2)


def block_sizes() -> str:
    """What is compared at every size, with ordinary intervals."""
    rows = []
    for regime, groups in SIZES.items():
        for first, second in ACROSS[regime]:
            for group in groups:
                each = group.difference(first, second)
                rows.append([WORDS[regime], f"{first} - {second}", parameters(group), *cells(each)])
    return table(["regime", "comparison", "parameters", "seeds", "difference", "95 % interval"], rows, words=2)


def block_alphas() -> str:
    """Mean and spread of alpha over the modules of the final weights, by setting."""
    rows = []
    for group in (LIMITED, ONE_PASS):
        found = []
        for name in group.settings():
            means, spreads = group.final_alphas(name)
            found.append([WORDS[group.regime], name, with_error(means), with_error(spreads), str(len(means))])
        rows += sorted(found, key=lambda row: row[3])
    headings = ["regime", "setting", "mean alpha", "spread of alpha over the modules", "seeds"]
    return table(headings, rows, words=2)


def block_cost() -> str:
    """The share of the refreshes in the time of training."""
    rows = []
    for groups in SIZES.values():
        for group in groups:
            lines = [line for line in group.lines() if line["refresh_seconds"] and line["train_seconds"]]
            shares = [100 * float(line["refresh_seconds"]) / float(line["train_seconds"]) for line in lines]
            seconds = statistics.median(float(line["train_seconds"]) for line in lines)
            every = f"{lines[0]['weight_decay.interval']} of {lines[0]['schedule.steps']} steps"
            cost = [every, f"{seconds:.0f} s", f"{statistics.median(shares):.1f} %", str(len(lines))]
            rows.append([WORDS[group.regime], parameters(group), *cost])
    headings = ["regime", "parameters", "a refresh every", "time of the steps", "refreshes", "runs"]
    return table(headings, rows, words=2)


def block_power() -> str:
    """Seeds for differences, from the spread of these runs."""
    rows = []
    for each in ruled():
        ones, others = each.group.pairs(each.rule.first, each.rule.second)
        count = each.look.seeds
        found = power_of(each.rule.first, each.rule.second, ones[:count], others[:count])
        needed = [f"{few} ({many})" for few, many in zip(found.needed, found.needed_at_most, strict=True)]
        name = f"{found.first} - {found.second}"
        known = [str(found.seeds), f"{found.deviation:.2f} %", f"{found.detectable:.2f} %"]
        rows.append([WORDS[each.group.regime], name, *known, *needed])
    effects = [f"seeds for {effect:g} %" for effect in EFFECTS]
    return table(["regime", "comparison", "seeds", "spread", "detectable with them", *effects], rows, words=2)


def block_earlier() -> str:
    """The earlier study."""
    rows = [[f"{each.first} - {each.second}", *cells(each)] for each in earlier()]
    return table(["one pass, 1.1 million parameters", "seeds", "difference", "95 % interval"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    name.removeprefix("block_"): value for name, value in list(globals().items()) if name.startswith("block_")
}
