"""`lora-targets`: which matrices get a LoRA adapter (KappaTune, arXiv 2506.16289).

Those with the smallest condition numbers, S_max / (S_min + 1e-8): what they know is spread over many directions, and
is disturbed least by a low-rank update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from esdtool.assignment.quantity import (
    OWN_SCORE,
    End,
    Given,
    Needs,
    Quantity,
    QuantitySettings,
    Unit,
    controlled,
    scored,
)

_EPS = 1e-8


class LoraTargetsSettings(QuantitySettings):
    """Settings of `--for lora-targets`."""

    target: float = Field(default=0.2, gt=0, le=1, description="Share of the matrices to adapt.")
    by: Literal["condition", "effective-rank"] = Field(
        default="condition",
        description="The smallest condition numbers (published), or the largest effective ranks over full ranks.",
    )
    control: Literal["none", "shuffled", "reversed"] = Field(
        default="none", description="For experiments, 'shuffled' or 'reversed' use of the scores."
    )
    control_seed: int = Field(default=0, description="Which permutation 'shuffled' takes.")


def condition_number(lambda_max: float, lambda_min: float) -> float:
    """Compute S_max / (S_min + 1e-8) from eigenvalues of W^T W, as peft's `KappaTuneSelector`.

    >>> round(condition_number(4.0, 1.0), 6)
    2.0
    """
    return math.sqrt(lambda_max) / (math.sqrt(lambda_min) + _EPS)


def _score(unit: Unit, by: str) -> float | None:
    if by == "condition":
        return unit.mean(
            lambda module: (
                None
                if module.lambda_max is None or module.lambda_min is None
                else condition_number(module.lambda_max, module.lambda_min)
            )
        )
    return unit.mean(lambda module: None if module.effective_rank is None else -module.effective_rank / module.num_eigs)


def _assign(units: Sequence[Unit], ends: Sequence[End], settings: LoraTargetsSettings) -> dict[str, Given]:
    del ends
    found, scores, missing = scored(units, lambda unit: _score(unit, settings.by))
    dealt = controlled(scores, settings.control, settings.control_seed)
    order = sorted(range(len(found)), key=lambda index: dealt[index])
    chosen = set(order[: max(1, int(len(found) * settings.target))])
    given = {
        unit.parameter: Given(value=index in chosen, score=abs(scores[index]), source=OWN_SCORE)
        for index, unit in enumerate(found)
    }
    return given | {name: Given(value=False, source=reason) for name, reason in missing.items()}


def _needs(settings: Any) -> Needs:
    del settings
    return Needs()


QUANTITY = Quantity(
    key="lora_target",
    summary="which matrices get a LoRA adapter: those with the smallest condition numbers",
    method="KappaTune",
    source="arXiv 2506.16289",
    settings=LoraTargetsSettings,
    needs=_needs,
    assign=_assign,
)
