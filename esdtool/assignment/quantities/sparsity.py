"""`sparsity`: the share of weights to prune in each matrix (AlphaPruning, NeurIPS 2024, arXiv 2410.10912).

With block means a_b of alpha, r_b = (1 - eps) + (a_b - min a) / (max a - min a) 2 eps, and sparsity r_b c, where c
makes the mean over all weights exactly the target. The public code does not keep a sparsity below 1; here what a cap
cuts off is spread over the others, so that the mean stays exact.
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
from esdtool.assignment.rule import decay_ratios
from esdtool.errors import UsageError


class SparsitySettings(ControlledSettings):
    """Settings of `--for sparsity`."""

    target: float = Field(
        default=0.7, gt=0, lt=1, description="Share of all weights to prune; 0.7 is the paper's main setting."
    )
    eps: float = Field(
        default=0.3, ge=0, le=1, description="Half width of the ratios; published 0.2 to 0.5 by model and pruner."
    )
    by: Literal["block", "module", "role"] = Field(
        default="block", description="What shares a mean score: a block (published), nothing, or a role."
    )
    cap: float = Field(default=0.99, gt=0, lt=1, description="Largest sparsity of a matrix.")
    fit: str = Field(
        default="fix-finger-legacy", description="Estimator of alpha; farms-fix-finger is AlphaPruning with FARMS."
    )

    @model_validator(mode="after")
    def _below_cap(self) -> Self:
        if self.target > self.cap:
            raise ValueError(f"the target {self.target:g} is above the cap {self.cap:g}")
        return self


def sparsities(
    scores: Sequence[float], sizes: Sequence[int], *, target: float, eps: float = 0.3, cap: float = 1.0
) -> list[float]:
    """Compute the sparsity of each matrix.

    >>> [round(sparsity, 4) for sparsity in sparsities([2.0, 4.0], [1, 1], target=0.5)]
    [0.35, 0.65]

    Args:
        scores: [n] alphas, those of a block alike.
        sizes: [n] numbers of weights.
        target: mean sparsity over all weights, in (0, 1).
        eps: half width of the ratios, in [0, 1].
        cap: largest sparsity of a matrix, not below the target.

    Returns:
        [n] sparsities in [0, cap], whose mean weighted by size is the target.
    """
    ratios = decay_ratios(scores, assign="linear", min_ratio=1 - eps, max_ratio=1 + eps)
    capped: set[int] = set()
    total = target * sum(sizes)
    while True:
        free = [index for index in range(len(ratios)) if index not in capped]
        left = total - cap * math.fsum(sizes[index] for index in capped)
        weight = math.fsum(sizes[index] * ratios[index] for index in free)
        if free and not weight:  # eps 1: ratios of 0 say nothing of what the cap leaves to them, so all are alike
            ratios = [1.0] * len(ratios)
            continue
        scale = left / weight if weight else 0.0
        beyond = [index for index in free if ratios[index] * scale > cap]
        if not beyond:
            break
        capped.update(beyond)
    return [cap if index in capped else ratio * scale for index, ratio in enumerate(ratios)]


def _assign(units: Sequence[Unit], ends: Sequence[End], settings: SparsitySettings) -> dict[str, Given]:
    del ends  # neither the paper nor its code prunes them
    found, scores, missing = scored(units, lambda unit: unit.alpha(settings.fit))
    groups, source = grouping(found, settings.by)
    scores = group_means(scores, groups)
    values = sparsities(
        controlled_groups(scores, groups, settings),
        [unit.size for unit in found],
        target=settings.target,
        eps=settings.eps,
        cap=settings.cap,
    )
    if not values:
        raise UsageError("sparsity: no matrix has an alpha by " + settings.fit)
    given = {
        unit.parameter: Given(value=value, ratio=value / settings.target, score=score, source=source)
        for unit, value, score in zip(found, values, scores, strict=True)
    }
    return given | {
        name: Given(value=settings.target, ratio=1.0, source=f"the target; {reason}")
        for name, reason in missing.items()
    }


QUANTITY = Quantity(
    key="sparsity",
    summary="the share of weights to prune: a lighter tail is pruned more",
    method="AlphaPruning",
    source="arXiv 2410.10912",
    settings=SparsitySettings,
    needs=needs_fit,
    assign=_assign,
)
