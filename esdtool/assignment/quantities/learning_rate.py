"""`learning-rate`: multipliers of the learning rate (LLR, TempBalance, Model Balancing).

The maps are in `esdtool.assignment.learning_rate_maps`. All parameters that get no ratio - norms, biases - keep the
rate of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from esdtool.assignment.fused import weighted_mean
from esdtool.assignment.learning_rate_maps import LEARNING_RATE_MAPS, LearningRateMapName
from esdtool.assignment.options import ScoreName
from esdtool.assignment.quantity import (
    OWN_SCORE,
    ControlledSettings,
    End,
    Given,
    Quantity,
    Unit,
    controlled,
    group_means,
    needs_fit,
)
from esdtool.assignment.scores import checked_score, score_value
from esdtool.errors import UsageError


class LearningRateSettings(ControlledSettings):
    """Settings of `--for learning-rate`."""

    map: LearningRateMapName = Field(default="llr", description="The published way from scores to ratios.")
    min_ratio: float | None = Field(default=None, ge=0, description="s1; the published value of the map by default.")
    max_ratio: float | None = Field(default=None, ge=0, description="s2; the published value of the map by default.")
    ends: bool | None = Field(
        default=None,
        description="Give the token embedding and the output head the ratio of the largest score; as the map's paper "
        "does by default.",
    )
    score: ScoreName = Field(default="alpha", description="What the ratios follow.")
    fit: str = Field(default="hill", description="Estimator of alpha.")
    normalize: bool = Field(default=False, description="Scale to a parameter-weighted mean ratio of 1.")


def _assign(units: Sequence[Unit], ends: Sequence[End], settings: LearningRateSettings) -> dict[str, Given]:
    """Compute the ratios of modules; a parameter of several has their mean, as with weight decay."""
    chosen = LEARNING_RATE_MAPS[settings.map]
    if chosen.published is None and (settings.min_ratio is not None or settings.max_ratio is not None):
        raise UsageError(f"learning-rate: the map {settings.map} has neither min_ratio nor max_ratio")
    low, high = chosen.published or (1.0, 1.0)
    low = low if settings.min_ratio is None else settings.min_ratio
    high = high if settings.max_ratio is None else settings.max_ratio

    modules = [(unit, module) for unit in units for module in unit.modules]
    values: dict[str, float] = {}
    for _, module in modules:
        value = score_value(settings.score, module.alphas.get(settings.fit), module) if module.ok else None
        score, _ = checked_score(settings.score, value)
        if score is not None:
            values[module.name] = score
    known = [(unit, module) for unit, module in modules if module.name in values]
    scores = [values[module.name] for _, module in known]
    if chosen.by_block:
        blocks = [module.name if module.layer is None else module.layer for _, module in known]
        scores = group_means(scores, blocks)
    with_ends = list(ends) if scores and (chosen.ends if settings.ends is None else settings.ends) else []
    scores += [max(scores)] * len(with_ends) if scores else []
    sizes = [math.prod(module.shape) for _, module in known] + [end.size for end in with_ends]

    ratios = chosen.ratios(scores, low, high)
    if settings.control == "mean" and ratios:
        mean = weighted_mean(ratios, sizes)
        assert mean is not None
        ratios = [mean] * len(ratios)
    else:
        ratios = controlled(ratios, settings.control, settings.control_seed)
    if settings.normalize and ratios:
        mean = weighted_mean(ratios, sizes)
        if not mean:
            raise UsageError("learning-rate: cannot normalize: all ratios are 0; choose a max_ratio above 0")
        ratios = [ratio / mean for ratio in ratios]

    by_module = dict(zip((module.name for _, module in known), ratios, strict=False))
    given = {}
    for unit in units:
        ratio = weighted_mean([by_module.get(module.name, 1.0) for module in unit.modules], unit.sizes)
        assert ratio is not None
        if any(module.name in by_module for module in unit.modules):
            score = weighted_mean([values.get(module.name) for module in unit.modules], unit.sizes)
            source = "mean of its block" if chosen.by_block else OWN_SCORE
            given[unit.parameter] = Given(value=ratio, ratio=ratio, score=score, source=source)
        else:
            given[unit.parameter] = Given(value=ratio, ratio=ratio, source=f"not scored: {unit.modules[0].status}")
    for end, ratio in zip(with_ends, ratios[len(known) :], strict=True):
        given[end.parameter] = Given(value=ratio, ratio=ratio, source=f"{end.role}: as the largest score")
    return given


QUANTITY = Quantity(
    key="lr_ratio",
    summary="multipliers of the learning rate: a lighter tail learns faster",
    method="LLR",
    source="arXiv 2605.22297; TempBalance arXiv 2312.00359; Model Balancing arXiv 2410.12178",
    settings=LearningRateSettings,
    needs=needs_fit,
    assign=_assign,
)
