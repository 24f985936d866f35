"""`train-layers`: which matrices to train, the others being frozen (Spectrum, arXiv 2406.06623).

The score of a matrix is the sum of its singular values above a threshold over the sum of the others, over the largest.
Of each type (role) the matrices with the largest scores are trained. The threshold is called Marchenko-Pastur's, but is
made of the quartiles of the singular values: most of a purely random matrix lies above it unless the matrix is square,
so that scores compare within one type only. `null="random"` subtracts the score of a random matrix of the same shape
and norm.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from esdtool.assignment.fused import weighted_mean
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
from esdtool.spectra.marchenko_pastur import mp_quantiles


class TrainLayersSettings(QuantitySettings):
    """Settings of `--for train-layers`."""

    target: float = Field(default=0.5, gt=0, le=1, description="Share of the matrices of each type to train.")
    null: Literal["none", "random"] = Field(
        default="none", description="Subtract nothing (published), or the score of a random matrix of that shape."
    )
    ends: bool = Field(
        default=True, description="Also train the token embedding and the output head, as Spectrum does."
    )
    control: Literal["none", "shuffled", "reversed"] = Field(
        default="none", description="For experiments, 'shuffled' or 'reversed' use of the scores of a type."
    )
    control_seed: int = Field(default=0, description="Which permutation 'shuffled' takes.")


def signal_to_noise(eigenvalues: npt.ArrayLike, shape: tuple[int, int]) -> float:
    """Compute Spectrum's score from eigenvalues of W^T W.

    With singular values S, sigma = (q75(S) - q25(S)) / 1.349 and the threshold sigma (1 + sqrt(short / long)): the sum
    of S above it over the sum of the rest, over the largest. Where nothing lies below, the sum of the rest is 1, as in
    the public code at 0ed1756; its published files are older, and have infinity there.

    Args:
        eigenvalues: [n] of W^T W, any order.
        shape: (rows, columns) of W.
    """
    singular = np.sqrt(np.maximum(np.asarray(eigenvalues, dtype=np.float64), 0.0))
    quarter, three_quarters = np.quantile(singular, [0.25, 0.75])
    short, long = sorted(shape)
    threshold = (three_quarters - quarter) / 1.349 * (1 + math.sqrt(short / long))
    signal = float(singular[singular > threshold].sum())
    below = singular[singular <= threshold]
    noise = float(below.sum()) if below.size else 1.0
    largest = float(singular.max())
    return signal / noise / largest if noise > 0 and largest > 0 else math.inf


def _score(unit: Unit, null: str) -> float | None:
    values: list[float | None] = []
    for module, eigenvalues in zip(unit.modules, unit.eigenvalues, strict=True):
        if eigenvalues is None or not module.ok:
            values.append(None)
            continue
        short, long = sorted((module.shape[0], math.prod(module.shape[1:])))
        value = signal_to_noise(eigenvalues, (short, long))
        if null == "random":
            random = mp_quantiles(short, long, len(eigenvalues))
            scale = float(np.sum(eigenvalues)) / float(np.sum(random))
            value -= signal_to_noise(random * scale, (short, long))
        values.append(value)
    return weighted_mean(values, unit.sizes)


def _assign(units: Sequence[Unit], ends: Sequence[End], settings: TrainLayersSettings) -> dict[str, Given]:
    found, scores, missing = scored(units, lambda unit: _score(unit, settings.null))
    types: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, unit in enumerate(found):
        types[unit.roles].append(index)
    chosen: set[int] = set()
    for members in types.values():
        dealt = controlled([scores[index] for index in members], settings.control, settings.control_seed)
        order = sorted(range(len(members)), key=lambda place: -dealt[place])
        chosen.update(members[place] for place in order[: int(len(members) * settings.target)])
    given = {
        unit.parameter: Given(value=index in chosen, score=scores[index], source=OWN_SCORE)
        for index, unit in enumerate(found)
    }
    given |= {name: Given(value=False, source=reason) for name, reason in missing.items()}
    if settings.ends:
        given |= {end.parameter: Given(value=True, source=f"{end.role}: always trained") for end in ends}
    return given


def _needs(settings: Any) -> Needs:
    del settings
    return Needs(eigenvalues=True)


QUANTITY = Quantity(
    key="train",
    summary="which matrices to train, the others frozen: those with the largest signal-to-noise ratios of each type",
    method="Spectrum",
    source="arXiv 2406.06623",
    settings=TrainLayersSettings,
    needs=_needs,
    assign=_assign,
)
