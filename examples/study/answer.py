"""The three sentences that docs/study.md begins with."""

from __future__ import annotations

from blocks import interval
from comparisons import LIMITED, ONE_PASS, Difference, Group, Ruled, ruled


def block_answer() -> str:
    """The answer, each sentence with what it holds for."""
    sentences = (
        f"Where text is little and seen often (a LLaMA of {size(LIMITED)}, 93 kB seen 11 times), tuned uniform decay "
        f"ends {gain(LIMITED.difference('uniform', 'none'))}; {policies(LIMITED)}; with its base tuned on four "
        f"seeds in place of one, it {outcome(look_of('alphadecay-0.6', 'uniform', LIMITED), 'uniform decay')}.",
        f"In one pass over text (the same model, 17.5 tokens a parameter), tuned uniform decay ends "
        f"{gain(ONE_PASS.difference('uniform', 'none'))}; {policies(ONE_PASS)}.",
        f"Layer-wise learning rates (LLR) with little text ended {against('uniform ones', 'llr', 'uniform')}, but "
        "uniform rates with LLR's rate for embedding and head alone ended "
        f"{against('those without', 'uniform-ends', 'uniform')}, and the balance between weight modules "
        f"{change(look_of('llr-modules', 'llr-modules-mean', LIMITED))}.",
    )
    return "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1))


def size(group: Group) -> str:
    """The parameters of a group's model."""
    return f"{group.parameters() / 1000:.0f} thousand parameters"


def gain(each: Difference) -> str:
    """How uniform decay ended, compared with none."""
    return f"{abs(each.mean):.1f} % {'below' if each.mean < 0 else 'above'} none ({ordinary(each)})"


def policies(group: Group) -> str:
    """What a group says of AlphaDecay."""
    balance, whole = look_of("alphadecay", "mean", group), look_of("alphadecay", "uniform", group)
    return (
        "AlphaDecay's balance between modules, by which it differs from the same total decay spread evenly, "
        f"{change(balance)}; AlphaDecay itself, at the base that was best for it, {outcome(whole, 'uniform decay')}"
    )


def look_of(first: str, second: str, group: Group) -> Ruled:
    """The last look at a comparison that had a rule."""
    return next(each for each in ruled() if (each.rule.first, each.rule.second, each.group) == (first, second, group))


def change(each: Ruled) -> str:
    """What the balance between modules did."""
    look = each.look
    if look.low > 0 or look.high < 0:
        return f"{'cost' if look.low > 0 else 'gained'} {abs(look.difference):.2f} % ({reach(each)})"
    return f"changed the perplexity by {look.difference:+.2f} %, which cannot be told from 0 ({reach(each)})"


def outcome(each: Ruled, other: str) -> str:
    """How a setting ended, compared with another one."""
    look = each.look
    if look.low > 0 or look.high < 0:
        return f"ended {abs(look.difference):.2f} % {'above' if look.low > 0 else 'below'} {other} ({reach(each)})"
    return f"could not be told from {other}: {look.difference:+.2f} % ({reach(each)})"


def reach(each: Ruled) -> str:
    """Interval and seeds of a look."""
    return f"95 % interval {interval(each.look.low, each.look.high)}, {each.look.seeds} seeds"


def against(other: str, first: str, second: str) -> str:
    """How a setting without a rule ended, compared with another one."""
    each = LIMITED.difference(first, second)
    return f"{abs(each.mean):.1f} % {'below' if each.mean < 0 else 'above'} {other} (exploratory; {ordinary(each)})"


def ordinary(each: Difference) -> str:
    """An ordinary interval, and the seeds."""
    return f"95 % interval {interval(each.low, each.high)}, {each.seeds} seeds"
