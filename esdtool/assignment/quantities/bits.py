"""`bits`: the width of quantised weights (AlphaQ, arXiv 2606.04980).

Minimise sum_i n_i s_i e_i(b_i) with the mean of b_i, weighted by n_i, within a budget. s_i = (alpha_0 / alpha_i)^gamma,
alpha_0 the median; e_i(b) = v_i 4^-b with the variance v_i of the weights (published: n_i = 1, however large a matrix
is), or the mean square of what rounding changes in the weights themselves (`esdtool.assignment.rounding`). The public
code solves an integer program; here `esdtool.assignment.spending` gives each step of bits to where it saves most.
"""

from __future__ import annotations

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
    Needs,
    Quantity,
    Unit,
    controlled,
    scored,
)
from esdtool.assignment.rounding import rounding_errors
from esdtool.assignment.spending import spend
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
    error: Literal["variance", "step", "rounding"] = Field(
        default="variance",
        description="Error of a width b: the variance times 4^-b (published) or times the squared step of a symmetric "
        "quantiser, (2^(b-1) - 1)^-2; or 'rounding', which reads the weights again and rounds them.",
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
        if self.error != "variance" and min(self.choices) < 2:
            raise ValueError("a symmetric quantiser needs at least 2 bits")
        low, high = min(self.choices), max(self.choices)
        if not low <= self.budget <= high:
            raise ValueError(
                f"the budget {self.budget:g} is not between the smallest and largest choice, {low} and {high}"
            )
        return self


def sensitivity(alpha: float, median: float, error: float, gamma: float) -> float:
    """Compute s_i e_i, what a matrix's error per weight counts."""
    return float((median / max(alpha, 1e-8)) ** gamma * error)


def falling(ladder: Sequence[int], error: str) -> list[float]:
    """Return how the modelled error falls with the width: 4^-b, or the squared step of a symmetric quantiser."""
    return [(2.0 ** (bits - 1) - 1) ** -2 if error == "step" else 4.0**-bits for bits in ladder]


def _errors(unit: Unit, ladder: Sequence[int], error: str) -> list[float]:
    """Return the mean square error of a parameter's weights at each width."""
    if error == "rounding":
        return rounding_errors(unit.read_rows(), ladder)
    variance = max(_variance(unit) or 0.0, _SMALLEST_VARIANCE)
    return [variance * factor for factor in falling(ladder, error)]


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
    ladder = sorted(settings.choices)
    costs = [
        [sensitivity(alpha, median, error, settings.gamma) for error in _errors(unit, ladder, settings.error)]
        for unit, alpha in zip(found, alphas, strict=True)
    ]
    sizes = [unit.size if settings.count == "weights" else 1 for unit in found]
    widths = spend(costs, sizes, ladder=ladder, budget=settings.budget)
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
    needs=lambda settings: Needs(fits=(settings.fit,), weights=settings.error == "rounding"),
    assign=_assign,
)
