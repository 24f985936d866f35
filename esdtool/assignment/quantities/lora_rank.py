"""`lora-rank`: ranks of LoRA adapters, by the rule with which AlphaLoRA deals experts (EMNLP 2024, arXiv 2410.10054).

The share of a block is proportional to its mean alpha to the power of beta: a lighter tail, which has learned less, is
given more. Whole ranks are made by largest remainders, where the public code corrects a rounded total by differences of
unlike units, and can leave a block with nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from esdtool.assignment.quantity import (
    ControlledSettings,
    End,
    Given,
    Quantity,
    Unit,
    controlled_groups,
    group_means,
    grouping,
    needs_fit,
    scored,
)
from esdtool.errors import UsageError


class LoraRankSettings(ControlledSettings):
    """Settings of `--for lora-rank`."""

    budget: float = Field(default=8.0, gt=0, description="Mean rank over the modules.")
    beta: float = Field(default=2.5, ge=0, description="Power of alpha.")
    min_rank: int = Field(default=1, ge=0, description="Smallest rank of a module; 0 lets a module have no adapter.")
    by: Literal["block", "module", "role"] = Field(
        default="block", description="What shares a mean score: a block (published), nothing, or a role."
    )
    fit: str = Field(default="fix-finger-legacy", description="Estimator of alpha.")

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.budget < self.min_rank:
            raise ValueError(f"the budget {self.budget:g} is below min_rank {self.min_rank}")
        return self


def allocate_ranks(weights: Sequence[float], *, total: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Deal a total in whole numbers, in proportion to weights and between bounds, by largest remainders.

    >>> allocate_ranks([1.0, 2.0, 4.0], total=8, least=[1, 1, 1], most=[9, 9, 4])
    [1, 3, 4]

    Args:
        weights: [n] positive numbers.
        total: sum of the result, between the sums of the bounds.
        least: [n] lower bounds.
        most: [n] upper bounds.

    Returns:
        [n] whole numbers.
    """
    low, high = 0.0, (total + 1) * max(1.0, max(most)) / min(weights)
    # The share per weight at which the clipped quotas add up to the total.
    for _ in range(200):
        middle = (low + high) / 2
        if math.fsum(_clipped(weights, middle, least, most)) < total:
            low = middle
        else:
            high = middle
    quotas = _clipped(weights, high, least, most)
    ranks = [math.floor(quota + 1e-9) for quota in quotas]
    by_remainder = sorted(range(len(ranks)), key=lambda index: (ranks[index] - quotas[index], index))
    while sum(ranks) < total:
        for index in by_remainder:
            if sum(ranks) < total and ranks[index] < most[index]:
                ranks[index] += 1
    return ranks


def _clipped(weights: Sequence[float], share: float, least: Sequence[int], most: Sequence[int]) -> list[float]:
    return [
        min(max(weight * share, float(low)), float(high))
        for weight, low, high in zip(weights, least, most, strict=True)
    ]


def _assign(units: Sequence[Unit], ends: Sequence[End], settings: LoraRankSettings) -> dict[str, Given]:
    del ends
    found, scores, _ = scored(units, lambda unit: unit.alpha(settings.fit))
    if not found:
        raise UsageError("lora-rank: no matrix has an alpha by " + settings.fit)
    most = [min(min(module.shape[-2:]) for module in unit.modules) for unit in found]
    total = round(settings.budget * len(found))
    if total > sum(most):
        raise UsageError(
            f"lora-rank: a mean rank of {settings.budget:g} is more than the matrices allow: their ranks are at most "
            f"{sum(most) / len(most):g} on average"
        )
    if any(high < settings.min_rank for high in most):
        raise UsageError(f"lora-rank: min_rank {settings.min_rank} is above the rank of a matrix, {min(most)}")
    groups, source = grouping(found, settings.by)
    scores = group_means(scores, groups)
    exchanged = controlled_groups(scores, groups, settings)
    largest = max(exchanged)
    ranks = allocate_ranks(
        [(score / largest) ** settings.beta for score in exchanged],
        total=total,
        least=[settings.min_rank] * len(found),
        most=most,
    )
    return {
        unit.parameter: Given(value=rank, ratio=rank / settings.budget, score=score, source=source)
        for unit, rank, score in zip(found, ranks, scores, strict=True)
    }


QUANTITY = Quantity(
    key="rank",
    summary="ranks of LoRA adapters: a lighter tail gets more",
    method="AlphaLoRA's rule",
    source="arXiv 2410.10054",
    settings=LoraRankSettings,
    needs=needs_fit,
    assign=_assign,
)
