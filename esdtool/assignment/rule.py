"""From scores to ratios of weight decay: the formulas of AlphaDecay (arXiv 2506.14562).

Pure: numbers in, numbers out. `esdtool.assign` applies them to an analysis, `esdtool.optim.AlphaDecay` to a live model,
both through `DecayRule`. Plain Python floats throughout: a sum by `math.fsum` and one operation at a time give the same
bits on every machine, so that all ranks agree.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final, get_args

from esdtool.assignment.options import (
    LARGEST_SCORE,
    AssignName,
    Control,
    Granularity,
    OptimizerName,
    check_choice,
)
from esdtool.errors import UsageError

PUBLISHED_RATIOS: Final[dict[str, tuple[float, float]]] = {"adamw": (0.67, 5.0), "adam": (0.67, 3.0)}
"""(s1, s2) of the linear assignment by optimizer (AlphaDecay, section 4 and appendix)."""

_EPS = 1e-8
_SIGMOID_SLOPE = 4.0

_EQUAL = 1e-9
"""Relative difference of scores that is rounding, and must not be stretched to the whole range of ratios."""


def decay_ratios(
    scores: Sequence[float],
    *,
    assign: AssignName = "linear",
    min_ratio: float = PUBLISHED_RATIOS["adamw"][0],
    max_ratio: float = PUBLISHED_RATIOS["adamw"][1],
    layers: Sequence[int | None] | None = None,
) -> list[float]:
    """Compute decay over base decay of each module from the modules' scores (alpha: small = heavy tail = weak decay).

    With scores a_1 .. a_n, and s1, s2 the two ratios:

    - `linear` (AlphaDecay, the method): s1 + (a_i - min a) / (max a - min a) (s2 - s1); all equal (to within
      1e-9, which is less than the accuracy of an alpha): 1 each.
    - `sqrt`, `log2` (AlphaDecay, ablation of the assignment function): n f(a_i) / sum_j f(a_j); the mean is 1.
    - `sigmoid` (AdaDecay, arXiv 1907.08931, module-wise as AlphaDecay compares with it): inside each layer
      z_i = (a_i - mean) / (std + 1e-8), std of the population, then 2 / (1 + exp(-4 z_i)).
    - `uniform`: 1 each.

    >>> decay_ratios([2.0, 3.0, 4.0], min_ratio=0.5, max_ratio=1.5)
    [0.5, 1.0, 1.5]
    >>> decay_ratios([4.0, 1.0], assign="sqrt")
    [1.3333333333333333, 0.6666666666666666]

    Args:
        scores: [n] finite numbers.
        assign: the formula.
        min_ratio: s1, of `linear` only.
        max_ratio: s2, of `linear` only.
        layers: [n] the modules' blocks, needed by `sigmoid`; modules outside blocks (None) form one layer.

    Returns:
        [n] ratios, not negative. Empty for no scores.

    Raises:
        UsageError: for an unknown formula, s1 > s2, or scores outside the formula's domain: `sqrt` takes
            scores >= 0, `log2` scores >= 1, of which one must be greater than the bound.
        ValueError: if a score is not finite or beyond 1e100, or `layers` does not fit.
    """
    for score in scores:
        if not abs(score) <= LARGEST_SCORE:
            raise ValueError(f"scores must be finite and at most {LARGEST_SCORE:g} in size, not {score}")
    if assign == "uniform":
        return [1.0] * len(scores)
    if assign == "linear":
        _check_ratios(min_ratio, max_ratio)
        return _linear(scores, min_ratio, max_ratio)
    if assign == "sqrt":
        return _share(scores, [math.sqrt(score) if score >= 0 else -1.0 for score in scores], "sqrt", bound=0)
    if assign == "log2":
        return _share(scores, [math.log2(score) if score >= 1 else -1.0 for score in scores], "log2", bound=1)
    if assign == "sigmoid":
        if layers is None or len(layers) != len(scores):
            raise ValueError("sigmoid compares modules inside a layer: layers must hold one entry a score")
        return _sigmoid(scores, layers)
    raise UsageError(f"unknown assignment {assign!r}; choose from {', '.join(get_args(AssignName))}")


@dataclass(frozen=True, kw_only=True)
class DecayRule:
    """The options that turn scores into ratios, checked on construction."""

    assign: AssignName = "linear"
    """Formula of `decay_ratios`."""
    min_ratio: float | None = None
    """s1 of `linear`; None takes the published value. Must be None for the other formulas."""
    max_ratio: float | None = None
    """s2 of `linear`; None takes the published value. Must be None for the other formulas."""
    optimizer: OptimizerName = "adamw"
    """Whose published ratios are the defaults: `adamw` (decoupled decay) or `adam` (decay as L2 penalty)."""
    granularity: Granularity = "module"
    """`module`: each its own (the method); `layer`, `role`: each takes the mean score of its layer or role."""
    normalize: bool = False
    """Scale the ratios, those of a control included, so that their mean, weighted by number of parameters, is 1."""
    control: Control = "none"
    """A fair control of an experiment, made from the method's own ratios. `mean`: each module takes their mean,
    weighted by number of parameters (as much decay in total, no balance); `shuffled`: the same ratios dealt to the
    modules at random; `reversed`: the same ratios in the opposite order, the strongest to the heaviest tail. Layers or
    roles that share a ratio exchange it as a whole."""
    control_seed: int = 0
    """Which permutation `shuffled` takes; it is the same at every refresh."""

    def __post_init__(self) -> None:
        """Refuse unknown names and contradictions.

        Raises:
            UsageError: with the option's name and its valid values.
        """
        check_choice("assignment", self.assign, AssignName)
        check_choice("optimizer", self.optimizer, OptimizerName)
        check_choice("granularity", self.granularity, Granularity)
        check_choice("control", self.control, Control)
        if self.assign != "linear" and (self.min_ratio is not None or self.max_ratio is not None):
            raise UsageError(f"min-ratio and max-ratio belong to the linear assignment, not to {self.assign!r}")
        if self.assign == "sigmoid" and self.granularity == "layer":
            raise UsageError("sigmoid compares the modules of a layer: granularity 'layer' would make them all equal")
        if self.assign == "linear":
            _check_ratios(*self.ratios_range)

    @property
    def ratios_range(self) -> tuple[float, float]:
        """The two ratios in force, (s1, s2)."""
        low, high = PUBLISHED_RATIOS[self.optimizer]
        return low if self.min_ratio is None else self.min_ratio, high if self.max_ratio is None else self.max_ratio

    def ratios(
        self,
        scores: Sequence[float | None],
        *,
        layers: Sequence[int | None],
        roles: Sequence[str],
        sizes: Sequence[int],
    ) -> list[float]:
        """Compute the ratio of each module.

        >>> DecayRule(max_ratio=3.0).ratios([2.0, None, 4.0], layers=[0, 0, 1], roles=["q", "k", "q"], sizes=[1, 1, 1])
        [0.67, 1.0, 3.0]

        Args:
            scores: [n]; None for a module that could not be scored: it takes ratio 1 and takes no part otherwise.
            layers: [n] blocks. For granularity `layer`, a module outside blocks (None) is a group of its own.
            roles: [n] roles.
            sizes: [n] numbers of parameters, the weights of `normalize`.

        Returns:
            [n] ratios, not negative.

        Raises:
            UsageError: as `decay_ratios`, or if `normalize` meets ratios that are all 0.
        """
        scored = [index for index, score in enumerate(scores) if score is not None]
        groups: list[Hashable] = list(scored)
        if self.granularity == "layer":
            groups = [("outside", index) if layers[index] is None else layers[index] for index in scored]
        elif self.granularity == "role":
            groups = [roles[index] for index in scored]
        values = _group_means([score for score in scores if score is not None], groups)
        low, high = self.ratios_range
        own_layers = [layers[index] for index in scored]
        found = decay_ratios(values, assign=self.assign, min_ratio=low, max_ratio=high, layers=own_layers)
        own_sizes = [sizes[index] for index in scored]
        if self.assign == "sigmoid":  # which gives a role another ratio in each layer
            groups = list(zip(groups, own_layers, strict=True))
        found = self._controlled(found, values, groups, own_sizes)
        if self.normalize:
            found = _normalized(found, own_sizes)
        ratios = [1.0] * len(scores)
        for index, ratio in zip(scored, found, strict=True):
            ratios[index] = ratio
        return ratios

    def _controlled(
        self, ratios: list[float], scores: Sequence[float], groups: Sequence[Hashable], sizes: Sequence[int]
    ) -> list[float]:
        """Exchange the ratios as the control says; the modules of one group have one score and one ratio."""
        if not ratios or self.control == "none":
            return ratios
        if self.control == "mean":
            return [_mean_ratio(ratios, sizes)] * len(ratios)
        ratio_of = dict(zip(groups, ratios, strict=True))
        if self.control == "shuffled":
            dealt = list(ratio_of.values())
            random.Random(self.control_seed).shuffle(dealt)
            exchanged = dict(zip(ratio_of, dealt, strict=True))
        else:
            score_of = dict(zip(groups, scores, strict=True))
            order = sorted(score_of, key=lambda group: score_of[group])
            exchanged = dict(zip(order, (ratio_of[group] for group in reversed(order)), strict=True))
        return [exchanged[group] for group in groups]


def _check_ratios(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low >= 0):
        raise UsageError(f"min-ratio and max-ratio must be finite and not negative, not {low} and {high}")
    if low > high:
        raise UsageError(f"min-ratio {low} is more than max-ratio {high}")


def _linear(scores: Sequence[float], low: float, high: float) -> list[float]:
    if not scores:
        return []
    smallest, largest = min(scores), max(scores)
    spread = largest - smallest
    if spread <= _EQUAL * max(abs(smallest), abs(largest)):
        return [1.0] * len(scores)
    positions = [(score - smallest) / spread for score in scores]
    # Written so that both ends are exact.
    return [(1.0 - position) * low + position * high for position in positions]


def _share(scores: Sequence[float], values: Sequence[float], name: str, *, bound: int) -> list[float]:
    """Compute n f(a_i) / sum f(a_j), where f(a) = 0 at `bound`; values below it are marked by -1."""
    if not scores:
        return []
    if min(values) < 0 or max(values) == 0:
        raise UsageError(
            f"{name} needs scores of at least {bound}, one of them above, but they lie between {min(scores):g} and "
            f"{max(scores):g}; choose another assignment, e.g. linear"
        )
    total = math.fsum(values)
    return [len(values) * value / total for value in values]


def _sigmoid(scores: Sequence[float], layers: Sequence[int | None]) -> list[float]:
    members: dict[int | None, list[int]] = defaultdict(list)
    for index, layer in enumerate(layers):
        members[layer].append(index)
    ratios = [1.0] * len(scores)
    for indices in members.values():
        mean = math.fsum(scores[index] for index in indices) / len(indices)
        variance = math.fsum((scores[index] - mean) ** 2 for index in indices) / len(indices)
        for index in indices:
            position = (scores[index] - mean) / (math.sqrt(variance) + _EPS)
            # |position| <= sqrt(n - 1); the bound keeps exp finite for layers of any size.
            ratios[index] = 2.0 / (1.0 + math.exp(min(-_SIGMOID_SLOPE * position, 700.0)))
    return ratios


def _group_means(values: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """Return each value replaced by the mean of its group."""
    members: dict[Hashable, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        members[group].append(value)
    # Relative to the first, so that the mean of equal numbers is that number to the last bit.
    means = {
        group: found[0] + math.fsum(value - found[0] for value in found) / len(found)
        for group, found in members.items()
    }
    return [means[group] for group in groups]


def _normalized(ratios: Sequence[float], sizes: Sequence[int]) -> list[float]:
    if not ratios:
        return []
    mean = _mean_ratio(ratios, sizes)
    if mean == 0:
        raise UsageError("cannot normalize: all ratios are 0; choose a max-ratio above 0")
    return [ratio / mean for ratio in ratios]


def _mean_ratio(ratios: Sequence[float], sizes: Sequence[int]) -> float:
    return math.fsum(ratio * size for ratio, size in zip(ratios, sizes, strict=True)) / sum(sizes)
