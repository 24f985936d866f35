"""`bits`: the width of quantised weights (AlphaQ, arXiv 2606.04980).

Minimise sum_i n_i s_i e_i(b_i) with the mean of b_i, weighted by n_i, within a budget. s_i = (alpha_0 / alpha_i)^gamma,
alpha_0 the median; e_i(b) = v_i 4^-b with the variance v_i of the weights (published: n_i = 1, however large a matrix
is). The cost is convex in b and a sum over matrices, so that giving the next step of bits where a bit saves most is
optimal while all steps fit; the public code solves an integer program.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from esdtool.assignment.quantity import (
    OWN_SCORE,
    ControlledSettings,
    End,
    Given,
    Quantity,
    Unit,
    controlled,
    needs_fit,
    scored,
)
from esdtool.errors import UsageError

_SMALLEST_VARIANCE = 1e-12
"""The public code's lower bound."""


class BitsSettings(ControlledSettings):
    """Settings of `--for bits`."""

    choices: tuple[int, ...] = Field(default=(2, 3, 4, 8), description="Widths to choose from, for example 2,3,4,8.")
    budget: float = Field(default=3.5, gt=0, description="Largest mean width.")
    gamma: float = Field(default=1.0, ge=0, description="How strongly alpha counts; 0: only the variance.")
    count: Literal["weights", "matrices"] = Field(
        default="weights",
        description="What the budget is a mean over: all weights, or, as in the public code, matrices of any size.",
    )
    error: Literal["variance", "step"] = Field(
        default="variance",
        description="Error of a width b: proportional to 4^-b (published), or to the squared step of a symmetric "
        "quantiser, (2^(b-1) - 1)^-2.",
    )
    fit: str = Field(default="hill-classic", description="Estimator of alpha.")

    @field_validator("choices", mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if not self.choices or min(self.choices) < 1 or len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices must be different whole numbers from 1, not {list(self.choices)}")
        if self.error == "step" and min(self.choices) < 2:
            raise ValueError("a symmetric quantiser needs at least 2 bits")
        low, high = min(self.choices), max(self.choices)
        if not low <= self.budget <= high:
            raise ValueError(
                f"the budget {self.budget:g} is not between the smallest and largest choice, {low} and {high}"
            )
        return self


def allocate_bits(
    sensitivities: Sequence[float],
    sizes: Sequence[int],
    *,
    choices: Sequence[int],
    budget: float,
    error: Literal["variance", "step"] = "variance",
) -> list[int]:
    """Choose widths greedily, the step that saves most per bit first.

    >>> allocate_bits([1.0, 16.0], [1, 1], choices=[2, 3, 4], budget=3.0)
    [2, 4]

    Args:
        sensitivities: [n] factors of the error of each matrix per weight, not negative.
        sizes: [n] what each counts in the budget and in the total error.
        choices: widths to choose from.
        budget: largest mean width, at least the smallest choice.
        error: how the error falls with the width.

    Returns:
        [n] widths whose mean, weighted by size, is at most the budget.
    """
    ladder = sorted(choices)
    errors = [4.0**-bits if error == "variance" else (2.0 ** (bits - 1) - 1) ** -2 for bits in ladder]
    place = [0] * len(sizes)
    # Rounding must not forbid a step that fits exactly.
    left = (budget - ladder[0]) * sum(sizes) * (1 + 1e-12)
    heap: list[tuple[float, int]] = []

    def offer(index: int) -> None:
        """Put the next step of a matrix among the candidates."""
        here = place[index]
        if here + 1 < len(ladder):
            saved = sensitivities[index] * (errors[here] - errors[here + 1]) / (ladder[here + 1] - ladder[here])
            heapq.heappush(heap, (-saved, index))

    for index in range(len(sizes)):
        offer(index)
    while heap:
        _, index = heapq.heappop(heap)
        price = (ladder[place[index] + 1] - ladder[place[index]]) * sizes[index]
        if price <= left:  # what does not fit now never will
            left -= price
            place[index] += 1
            offer(index)
    return [ladder[index] for index in place]


def sensitivity(alpha: float, median: float, variance: float, gamma: float) -> float:
    """Compute s_i v_i, the factor of a matrix's error per weight."""
    return float((median / max(alpha, 1e-8)) ** gamma * max(variance, _SMALLEST_VARIANCE))


def _variance(unit: Unit) -> float | None:
    """Compute the mean square of the weights, which is their variance up to the square of a mean that is nearly 0."""
    return unit.mean(
        lambda module: None if module.frobenius_norm is None else module.frobenius_norm**2 / math.prod(module.shape)
    )


def _assign(units: Sequence[Unit], ends: Sequence[End], settings: BitsSettings) -> dict[str, Given]:
    del ends  # the paper's code leaves them as they are
    found, scores, missing = scored(
        units, lambda unit: unit.alpha(settings.fit) if _variance(unit) is not None else None
    )
    if not found:
        raise UsageError("bits: no matrix has an alpha by " + settings.fit)
    alphas = controlled(scores, settings.control, settings.control_seed)
    median = statistics.median(alphas)
    factors = [
        sensitivity(alpha, median, _variance(unit) or 0.0, settings.gamma)
        for unit, alpha in zip(found, alphas, strict=True)
    ]
    sizes = [unit.size if settings.count == "weights" else 1 for unit in found]
    widths = allocate_bits(factors, sizes, choices=settings.choices, budget=settings.budget, error=settings.error)
    given = {
        unit.parameter: Given(value=width, ratio=width / settings.budget, score=score, source=OWN_SCORE)
        for unit, width, score in zip(found, widths, scores, strict=True)
    }
    # A width that keeps the mean within the budget.
    plain = max(width for width in settings.choices if width <= settings.budget)
    return given | {
        name: Given(value=plain, ratio=plain / settings.budget, source=f"the largest width within the budget; {reason}")
        for name, reason in missing.items()
    }


QUANTITY = Quantity(
    key="bits",
    summary="bits per weight: a heavier tail keeps more",
    method="AlphaQ",
    source="arXiv 2606.04980",
    settings=BitsSettings,
    needs=needs_fit,
    assign=_assign,
)
