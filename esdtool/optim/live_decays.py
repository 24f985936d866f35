"""From the scores of a live model's modules to the decays of its parameters, and to a wd.json of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from esdtool._version import __version__
from esdtool.assignment.document import Assignment, Default, Entry, Method, Origin
from esdtool.assignment.fused import joined_roles, joined_status, members_of, unscored_note, weighted_mean
from esdtool.assignment.options import Unlisted
from esdtool.assignment.rule import DecayRule
from esdtool.modules import WeightModule
from esdtool.optim.live_scores import LiveScore, Measure


def live_ratios(
    rule: DecayRule,
    modules: Mapping[str, Sequence[WeightModule]],
    found: Sequence[Sequence[LiveScore]],
    *,
    ends: Mapping[str, int] = MappingProxyType({}),
) -> tuple[dict[str, LiveScore], dict[str, float]]:
    """Compute the score and the ratio of each parameter.

    Args:
        rule: from scores to ratios, which it makes for modules.
        modules: those that each parameter holds.
        found: their scores, in the same order.
        ends: parameters without a spectrum that take the largest score of all, with their sizes.

    Returns:
        (scores, ratios) by parameter; one that holds several modules has the means, weighted by their sizes. The ends
        have ratios only.
    """
    flat = [module for held in modules.values() for module in held]
    values = [score.value for held in found for score in held]
    sizes = [math.prod(module.shape) for module in flat]
    largest = max((value for value in values if value is not None), default=None)
    ratios = rule.ratios(
        [*values, *([largest] * len(ends))],
        layers=[*(module.layer for module in flat), *([None] * len(ends))],
        roles=[*(module.role for module in flat), *ends],
        sizes=[*sizes, *ends.values()],
    )
    of_parameters = {}
    start = 0
    for (name, held), scores in zip(modules.items(), found, strict=True):
        part = slice(start, start := start + len(held))
        of_parameters[name] = _of_parameter(held, scores, ratios[part], sizes[part])
    scores_by_name = {name: score for name, (score, _) in of_parameters.items()}
    by_name = {name: ratio for name, (_, ratio) in of_parameters.items()}
    return scores_by_name, by_name | dict(zip(ends, ratios[start:], strict=True))


def live_note(score: LiveScore, *, weight_decay: float, base: float) -> str | None:
    """Say why a parameter does not follow the scores of all of its modules; None if it does."""
    # A parameter of which some modules are scored has the mean of their scores.
    return unscored_note(score.status, is_mean=score.value is not None, weight_decay=weight_decay, base=base)


def live_assignment(
    modules: Mapping[str, Sequence[WeightModule]],
    scores: Mapping[str, LiveScore],
    ratios: Mapping[str, float],
    bases: Mapping[str, float],
    *,
    rule: DecayRule,
    measure: Measure,
    unlisted: Unlisted,
    model_type: str | None,
    notes: Mapping[str, str],
    left_out: Mapping[str, str],
) -> Assignment:
    """Write the decays as a wd.json; all mappings are by parameter. `base_weight_decay` is the first parameter's."""
    low, high = rule.ratios_range if rule.assign == "linear" else (None, None)
    base = next(iter(bases.values()))
    return Assignment(
        created_by=f"esdtool {__version__}",
        source=Origin(checkpoint="memory", model_type=model_type),
        base_weight_decay=base,
        optimizer="l2" if rule.optimizer == "adam" else "decoupled",
        method=Method(
            name="uniform" if rule.assign == "uniform" else "alphadecay",
            score=measure.score,
            fit=measure.options.fit[0],
            assign=rule.assign,
            min_ratio=low,
            max_ratio=high,
            granularity=rule.granularity,
            normalize=rule.normalize,
            control=rule.control,
        ),
        default=Default.of(unlisted, base),
        parameters={
            name: Entry(
                weight_decay=bases[name] * ratios[name],
                ratio=ratios[name],
                alpha=scores[name].alpha,
                score=None if measure.score == "alpha" else scores[name].value,
                role=joined_roles(module.role for module in held),
                layer=held[0].layer,
                shape=held[0].stored_shape,
                note=notes.get(name),
            )
            for name, held in modules.items()
        },
        members={
            name: members
            for name, held in modules.items()
            if (members := members_of([module.name for module in held])) is not None
        },
        left_out=dict(left_out),
    )


def _of_parameter(
    modules: Sequence[WeightModule], scores: Sequence[LiveScore], ratios: Sequence[float], sizes: Sequence[int]
) -> tuple[LiveScore, float]:
    """Join the scores and ratios of a parameter's modules: (score, ratio)."""
    if len(modules) == 1:
        return scores[0], ratios[0]
    ratio = weighted_mean(ratios, sizes)
    assert ratio is not None
    score = LiveScore(
        status=joined_status({module.name: score.status for module, score in zip(modules, scores, strict=True)}),
        alpha=weighted_mean([score.alpha for score in scores], sizes),
        value=weighted_mean([score.value for score in scores], sizes),
    )
    return score, ratio
