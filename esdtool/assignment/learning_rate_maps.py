"""From scores to ratios of the learning rate: LLR, TempBalance and Model Balancing.

Pure: numbers in, numbers out, plain Python floats throughout. The assignment of a file and the live schedules come
through here. In all of them a larger alpha (a lighter tail: a module that has learned less) means a larger rate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from esdtool.assignment.options import LARGEST_SCORE
from esdtool.assignment.rule import decay_ratios
from esdtool.errors import UsageError

LearningRateMapName = Literal[
    "llr", "tempbalance", "tempbalance-sqrt", "tempbalance-log2", "tempbalance-step", "model-balancing"
]

LLR_RATIOS: Final = (1.0, 5.0)
"""(s1, s2) of LLR's scripts for 1B parameters; its YAML files have (1, 3)."""
TEMPBALANCE_RATIOS: Final = (0.5, 1.5)
"""(s1, s2) of TempBalance for images; its language models have (1, 2)."""
BALANCING_RANGE: Final = (2.0, 1.0)
"""(sigmoid_min, sigmoid_max) of Model Balancing: ratios lie between 10^-1 and 10^0.5."""
BALANCING_SLOPE: Final = 10.0
"""Steepness of Model Balancing's sigmoid."""


@dataclass(frozen=True, kw_only=True)
class LearningRateMap:
    """A published way from scores to ratios of the learning rate."""

    ratios: Callable[[Sequence[float], float, float], list[float]]
    """Compute the ratios [n] of scores [n] from (s1, s2)."""
    published: tuple[float, float] | None
    """The published (s1, s2); None where the map has no such pair."""
    ends: bool
    """Whether the token embedding and the output head take the ratio of the largest score."""
    by_block: bool
    """Whether all modules of a block share the mean of their scores."""
    source: str
    """Where it is published."""


def linear_ratios(scores: Sequence[float], low: float, high: float) -> list[float]:
    """Compute s1 + (a_i - min a) / (max a - min a) (s2 - s1), the map of LLR and of TempBalance (`tb_linear_map`).

    >>> linear_ratios([2.0, 3.0, 4.0], 1.0, 5.0)
    [1.0, 3.0, 5.0]

    Args:
        scores: [n] finite numbers.
        low: s1, the ratio of the smallest score.
        high: s2, the ratio of the largest score.

    Returns:
        [n] ratios; 1 each where all scores are equal, and nothing is to be balanced.

    Raises:
        UsageError: if s1 > s2, or one of them is negative or not finite.
        ValueError: if a score is not finite.
    """
    return decay_ratios(scores, assign="linear", min_ratio=low, max_ratio=high)


def step_ratios(scores: Sequence[float], low: float, high: float) -> list[float]:
    """Compute s1 + (s2 - s1) i / n, where i counts the scores from the smallest, 0-based (TempBalance's `tb_step`).

    Equal scores share the mean of their places, where the public code takes the order of the modules.

    >>> [round(ratio, 4) for ratio in step_ratios([2.0, 3.0, 5.0], 0.5, 1.5)]
    [0.5, 0.8333, 1.1667]

    Args:
        scores: [n] finite numbers.
        low: s1.
        high: s2, which no module reaches.

    Returns:
        [n] ratios; 1 each where all scores are equal.

    Raises:
        UsageError: if s1 > s2, or one of them is negative or not finite.
        ValueError: if a score is not finite.
    """
    linear = linear_ratios(scores, low, high)  # refuses what cannot be mapped
    if len(set(linear)) < 2:
        return linear
    places: dict[float, list[int]] = defaultdict(list)
    for place, score in enumerate(sorted(scores)):
        places[score].append(place)
    mean = {score: sum(found) / len(found) for score, found in places.items()}
    return [low + (high - low) * mean[score] / len(scores) for score in scores]


def balancing_ratios(
    scores: Sequence[float], low: float = BALANCING_RANGE[0], high: float = BALANCING_RANGE[1]
) -> list[float]:
    """Compute the ratios of Model Balancing (EMNLP 2024, arXiv 2410.12178).

    With x_b = a_b - mean a and s = `high` where x_b > 0, `low` elsewhere: 10^(s (1 / (1 + exp(-10 x_b)) - 1/2)).

    >>> [round(ratio, 3) for ratio in balancing_ratios([2.0, 2.0, 2.0])]
    [1.0, 1.0, 1.0]

    Args:
        scores: [n] mean scores of blocks.
        low: sigmoid_min; ratios stay above 10^(-low / 2).
        high: sigmoid_max; ratios stay below 10^(high / 2).

    Returns:
        [n] ratios.

    Raises:
        UsageError: if a bound is negative or not finite.
        ValueError: if a score is not finite.
    """
    if not scores:
        return []
    _check_scores(scores)
    mean = scores[0] + math.fsum(score - scores[0] for score in scores) / len(scores)
    return [balancing_ratio(score - mean, low, high) for score in scores]


def balancing_ratio(deviation: float, low: float = BALANCING_RANGE[0], high: float = BALANCING_RANGE[1]) -> float:
    """Compute Model Balancing's ratio of a block whose score deviates so much from the mean of the blocks.

    >>> round(balancing_ratio(-0.1), 4), balancing_ratio(0.0), round(balancing_ratio(0.3), 4)
    (0.3451, 1.0, 2.8351)
    """
    if not (0 <= low < math.inf and 0 <= high < math.inf):
        raise UsageError(f"the bounds of model-balancing must be finite and not negative, not {low} and {high}")
    scale = high if deviation > 0 else low
    # 1 / (1 + exp(-z)) - 1/2 = tanh(z / 2) / 2, which cannot overflow.
    return math.pow(10.0, scale * math.tanh(BALANCING_SLOPE * deviation / 2) / 2)


def _sqrt_ratios(scores: Sequence[float], low: float, high: float) -> list[float]:
    del low, high  # the mean ratio is 1
    return decay_ratios(scores, assign="sqrt")


def _log2_ratios(scores: Sequence[float], low: float, high: float) -> list[float]:
    del low, high  # the mean ratio is 1
    return decay_ratios(scores, assign="log2")


def _check_scores(scores: Sequence[float]) -> None:
    for score in scores:
        if not abs(score) <= LARGEST_SCORE:
            raise ValueError(f"scores must be finite and at most {LARGEST_SCORE:g} in size, not {score}")


LEARNING_RATE_MAPS: Final[dict[LearningRateMapName, LearningRateMap]] = {
    "llr": LearningRateMap(
        ratios=linear_ratios, published=LLR_RATIOS, ends=True, by_block=False, source="arXiv 2605.22297"
    ),
    "tempbalance": LearningRateMap(
        ratios=linear_ratios, published=TEMPBALANCE_RATIOS, ends=False, by_block=False, source="arXiv 2312.00359"
    ),
    "tempbalance-sqrt": LearningRateMap(
        ratios=_sqrt_ratios,
        published=None,
        ends=False,
        by_block=False,
        source="arXiv 2312.00359",
    ),
    "tempbalance-log2": LearningRateMap(
        ratios=_log2_ratios,
        published=None,
        ends=False,
        by_block=False,
        source="arXiv 2312.00359",
    ),
    "tempbalance-step": LearningRateMap(
        ratios=step_ratios, published=TEMPBALANCE_RATIOS, ends=False, by_block=False, source="arXiv 2312.00359"
    ),
    "model-balancing": LearningRateMap(
        ratios=balancing_ratios, published=BALANCING_RANGE, ends=False, by_block=True, source="arXiv 2410.12178"
    ),
}
"""The maps by name. `min_ratio` and `max_ratio` replace `published`."""
