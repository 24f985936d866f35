"""The recorded runs of the study, and what they say of two settings.

Differences are those of the logarithms of the perplexities, in percent, paired by seed; negative is better for the
first.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from esdtool.comparison.stopping import Look, StoppingRule, look_at, parse_rule, planned_looks

STUDY = Path(__file__).resolve().parent
FINAL, AVERAGED = "final_perplexity", "averaged_perplexity"
RULED = ("limited/decay.toml", "limited/decay-retuned.toml", "onepass/compare.toml", "limited/rates.toml")
"""The sweeps with a rule that was fixed before their first run."""
Line = dict[str, str]


def read(path: Path) -> list[Line]:
    """Read a CSV file with headings."""
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


RUNS = read(STUDY / "results" / "runs.csv")
ALPHAS = read(STUDY / "results" / "alphas.csv")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that may be compared: one regime and one size of the model."""

    regime: str
    sweep: str

    def lines(self, setting: str | None = None) -> list[Line]:
        """The runs of a setting, or of all."""
        found = (line for line in RUNS if (line["regime"], line["sweep"]) == (self.regime, self.sweep))
        return [line for line in found if setting in (None, line["setting"])]

    def settings(self) -> list[str]:
        """The settings that have runs."""
        return list(dict.fromkeys(line["setting"] for line in self.lines()))

    def perplexities(self, setting: str, *, column: str = FINAL) -> dict[int, float]:
        """The results of a setting, by seed."""
        return {int(line["seed"]): float(line[column]) for line in self.lines(setting) if line[column]}

    def pairs(self, first: str, second: str, *, column: str = FINAL) -> tuple[list[float], list[float]]:
        """The results of two settings for the seeds that both have, in order."""
        ones, others = self.perplexities(first, column=column), self.perplexities(second, column=column)
        seeds = sorted(ones.keys() & others.keys())
        return [ones[seed] for seed in seeds], [others[seed] for seed in seeds]

    def difference(self, first: str, second: str, *, column: str = FINAL, seeds: int | None = None) -> Difference:
        """An ordinary interval and t-test over the common seeds, or the first few of them."""
        ones, others = self.pairs(first, second, column=column)
        return difference(first, second, ones[:seeds], others[:seeds])

    def parameters(self) -> int:
        """The number of parameters of the model, a LLaMA whose head is not tied."""
        (path,) = {line["model.config"] for line in self.lines()}
        shape = json.loads((STUDY.parents[1] / path).read_text(encoding="utf-8"))
        hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
        block = 4 * hidden**2 + 3 * hidden * shape["intermediate_size"] + 2 * hidden
        return int(2 * shape["vocab_size"] * hidden + layers * block + hidden)

    def final_alphas(self, setting: str) -> tuple[list[float], list[float]]:
        """Mean and spread of alpha over the modules of the final weights, each by seed."""
        last: dict[str, Line] = {}
        for line in ALPHAS:  # in the order of the steps
            if (line["regime"], line["sweep"], line["setting"]) == (self.regime, self.sweep, setting):
                last[line["seed"]] = line
        means, spreads = (
            [float(line[column]) for line in last.values()] for column in ("alpha_mean", "alpha_deviation")
        )
        return means, spreads


LIMITED = Group(regime="limited", sweep="compare")
ONE_PASS = Group(regime="onepass", sweep="compare")
SIZES = {
    "limited": (Group(regime="limited", sweep="small"), LIMITED, Group(regime="limited", sweep="large")),
    "onepass": (ONE_PASS,),
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A comparison over common seeds, in percent, with an ordinary 95 % interval."""

    first: str
    second: str
    seeds: int
    mean: float
    low: float
    high: float
    p_value: float


def difference(first: str, second: str, ones: Sequence[float], others: Sequence[float]) -> Difference:
    """Compare by Student's t, for a number of seeds that was fixed beforehand."""
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


@dataclass(frozen=True, kw_only=True)
class Ruled:
    """A comparison that had a rule, at its last complete look."""

    group: Group
    rule: StoppingRule
    look: Look

    @property
    def decision(self) -> str:
        """What the rule says."""
        if self.look.width < self.rule.width:
            return "decided"
        return "undecided at the maximum" if self.look.number == self.look.planned else "not at its end"


def ruled() -> list[Ruled]:
    """Every comparison that a rule was fixed for, in the order of the files."""
    found = []
    for name in RULED:
        plan: dict[str, Any] = tomllib.loads((STUDY / name).read_text(encoding="utf-8"))["sweep"]
        group = Group(regime=Path(plan["dir"]).parent.name, sweep=Path(plan["dir"]).name)
        looks = planned_looks(len(plan["seeds"]), plan["max_seeds"])
        rules = [parse_rule(each) for each in ([plan["until"]] if isinstance(plan["until"], str) else plan["until"])]
        count = last_look(group, rules, looks)
        for rule in rules if count else ():
            ones, others = group.pairs(rule.first, rule.second)
            found.append(Ruled(group=group, rule=rule, look=look_at(ones[:count], others[:count], looks)))
    return found


def last_look(group: Group, rules: Sequence[StoppingRule], looks: tuple[int, ...]) -> int | None:
    """The number of seeds at which the rules stopped, or the last one that is complete; None before the first."""
    last = None
    for count in looks:
        pairs = [(rule, *group.pairs(rule.first, rule.second)) for rule in rules]
        if any(len(ones) < count for _, ones, _ in pairs):
            break
        last = count
        if all(look_at(ones[:count], others[:count], looks).width < rule.width for rule, ones, others in pairs):
            break
    return last


EARLIER = (
    ("final-adamw", "uniform", "none"),
    ("final-adamw", "alphadecay", "none"),
    ("final-adamw", "alphadecay", "uniform"),
    ("controls-adamw", "alphadecay", "alphadecay, control mean"),
)
"""The comparisons of the earlier study in one pass: file and settings."""


def earlier() -> list[Difference]:
    """The comparisons of the earlier study."""
    found = []
    for name, first, second in EARLIER:
        settings: dict[str, dict[int, float]] = {}
        for line in read(STUDY / "results" / f"{name}.csv"):
            control = line.get("weight_decay.control") or "none"
            label = line["policy"] if control == "none" else f"{line['policy']}, control {control}"
            settings.setdefault(label, {})[int(line["seed"])] = float(line[FINAL])
        seeds = sorted(settings[first].keys() & settings[second].keys())
        values = [[settings[label][seed] for seed in seeds] for label in (first, second)]
        found.append(difference(first, second, *values))
    return found
