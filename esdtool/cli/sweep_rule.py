"""The rule that says when a sweep has enough seeds, and what the finished runs say about the number of seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from esdtool.cli.output import note
from esdtool.comparison.power import EFFECTS, power_of
from esdtool.comparison.stopping import Look, StoppingRule, look_at, parse_rule, planned_looks
from esdtool.errors import UsageError
from esdtool.train.sweep.plan import SweepPlan
from esdtool.train.sweep.runner import final_perplexity, state_of


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules of a sweep; none of them if it has just the seeds of its file."""

    rules: tuple[StoppingRule, ...]
    looks: tuple[int, ...]
    """Numbers of seeds at which the sweep looks whether it has enough."""

    @classmethod
    def of(cls, plan: SweepPlan, path: str, *, until: Sequence[str], max_seeds: int | None) -> Rules:
        """Take the rules of the command line, or else those of the file.

        Args:
            plan: the sweep, with the seeds of its file.
            path: the file, for messages.
            until: rules of the command line.
            max_seeds: of the command line.

        Raises:
            UsageError: for a rule that is none, names no setting, or has too few seeds.
        """
        rules = tuple(map(parse_rule, until or plan.until))
        for rule in rules:
            for name in (rule.first, rule.second):
                if name not in plan.names:
                    raise UsageError(
                        f"'{rule}': no setting of {path} is called {name}; there are {_listed(plan.names)}"
                    )
        if max_seeds is not None and not rules:
            raise UsageError(f"--max-seeds needs a rule: --until, or [sweep] until in {path}")
        maximum = plan.max_seeds if max_seeds is None else max_seeds
        return cls(rules=rules, looks=planned_looks(len(plan.seeds), maximum) if rules else ())

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings to which seeds are added."""
        return tuple(dict.fromkeys(name for rule in self.rules for name in (rule.first, rule.second)))

    def announce(self) -> None:
        """Say what the sweep does after the seeds of its file."""
        if self.rules:
            wanted = " and ".join(f"'{rule}'" for rule in self.rules)
            note(f"then more seeds of {_listed(self.settings)}, up to {self.looks[-1]}, until {wanted}")

    def look(self, plan: SweepPlan) -> list[tuple[StoppingRule, Look]]:
        """Compare the settings of each rule, whose runs are all finished."""
        found = []
        for rule in self.rules:
            first, second = _perplexities(plan, rule.first), _perplexities(plan, rule.second)
            seeds = [seed for seed in plan.seeds if seed in first and seed in second]
            found.append((rule, look_at([first[seed] for seed in seeds], [second[seed] for seed in seeds], self.looks)))
        return found


def told(rule: StoppingRule, look: Look) -> str:
    """Return a look in one line."""
    return (
        f"{rule.first} - {rule.second}: {look.difference:+.2f} %, 95 % interval {look.low:+.2f} to {look.high:+.2f} "
        f"({look.seeds} seeds, look {look.number} of {look.planned}, nominal {100 * look.level:.1f} %)"
    )


def verdict(rule: StoppingRule, look: Look) -> str:
    """Return what the last look decides, in words."""
    apart = "0 is outside it" if look.low > 0 or look.high < 0 else "0 is inside it"
    if look.width < rule.width:
        return f"the interval is narrower than {rule.width:g} %, and {apart}"
    return f"undecided: the interval is not narrower than {rule.width:g} % after {look.seeds} seeds; {apart}"


def show_power(plan: SweepPlan, rules: Rules, path: str) -> None:
    """Print the power of the comparisons of the rules, or of each setting with the first one of the file.

    Raises:
        UsageError: if no comparison has two finished seeds.
    """
    from esdtool.report.terminal.power import print_power

    first, *others = plan.names
    pairs = [(rule.first, rule.second) for rule in rules.rules] or [(other, first) for other in others]
    if not pairs:
        raise UsageError(f"{path} has one setting, {first}, and nothing to compare it with")
    found = []
    for one, other in pairs:
        ones, seconds = _perplexities(plan, one), _perplexities(plan, other)
        seeds = [seed for seed in plan.seeds if seed in ones and seed in seconds]
        if len(seeds) > 1:
            found.append(power_of(one, other, [ones[seed] for seed in seeds], [seconds[seed] for seed in seeds]))
        else:
            note(f"{one} - {other}: too few finished seeds in common ({len(seeds)}): a spread needs at least 2")
    if not found:
        raise UsageError(f"{path}: no two settings have 2 finished seeds in common; run the sweep first")
    print_power(found, EFFECTS)


def _perplexities(plan: SweepPlan, name: str) -> dict[int, float]:
    """Final perplexities of the finished runs of a setting, by seed."""
    runs = [run for run in plan.runs if run.name == name and state_of(run) == "finished"]
    return {run.seed: value for run in runs if (value := final_perplexity(run)) is not None}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
