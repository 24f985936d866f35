"""The three sentences that docs/study.md begins with."""

from __future__ import annotations

from collections.abc import Mapping

from blocks import interval, parameters
from comparisons import LIMITED, ONE_PASS, Difference, Group, Ruled, ruled

Looks = Mapping[tuple[str, str, Group], Ruled]


def block_answer() -> str:
    """The answer, each sentence with what it holds for."""
    looks = {(each.rule.first, each.rule.second, each.group): each for each in ruled()}
    retuned = looks["alphadecay-0.6", "uniform", LIMITED]
    modules = looks["llr-modules", "llr-modules-mean", LIMITED]
    ends = "uniform ones with LLR's rate of embedding and head"
    sentences = (
        f"Where text is little and seen often (a LLaMA of {parameters(LIMITED)} parameters, 93 kB "
        f"seen 11 times), {policies(LIMITED, looks)}; with its base tuned on four seeds in place of one, it ended "
        f"{by(retuned, 'uniform decay')}.",
        f"In one pass over text (the same model, 17.5 tokens a parameter), {policies(ONE_PASS, looks)}.",
        "Layer-wise learning rates (LLR) with little text ended "
        f"{tried(LIMITED.difference('llr', 'uniform'), 'uniform ones')}, and "
        f"{tried(LIMITED.difference('llr', 'uniform-ends'), ends)}, both exploratory; their balance between weight "
        f"modules alone ended {by(modules, 'the mean of the rates')}.",
    )
    return "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1))


def policies(group: Group, looks: Looks) -> str:
    """What a group says of uniform decay and of AlphaDecay."""
    balance, whole = looks["alphadecay", "mean", group], looks["alphadecay", "uniform", group]
    gained = balance.look.high < 0 or whole.look.high < 0
    return (
        f"tuned uniform decay ended {tried(group.difference('uniform', 'none'), 'none')}, and "
        f"{'AlphaDecay gained' if gained else 'no gain of AlphaDecay showed'}: it ended {by(whole, 'uniform decay')}, "
        f"each at the best base of its grid, and {by(balance, 'the same total decay spread evenly')}, from which only "
        "its balance between modules tells it"
    )


def by(each: Ruled, other: str) -> str:
    """How far from another setting one ended by a rule."""
    return apart(each.look.difference, each.look.low, each.look.high, each.look.seeds, other)


def tried(each: Difference, other: str) -> str:
    """How far from another setting one ended without a rule."""
    return apart(each.mean, each.low, each.high, each.seeds, other)


def apart(mean: float, low: float, high: float, seeds: int, other: str) -> str:
    """A difference with its 95 % interval.

    >>> apart(-0.5, -1.0, 0.2, 8, "none")
    '0.50 % below none (-1.00 to +0.20 %, 8 seeds)'
    """
    return f"{abs(mean):.2f} % {'below' if mean < 0 else 'above'} {other} ({interval(low, high)}, {seeds} seeds)"
