"""From scores to weight decays: the formulas of AlphaDecay (arXiv 2506.14562), and `assign`.

Pure: numbers in, numbers out. `assign` applies the formulas to an analysis, `esdtool.optim.AlphaDecay`
to a live model, both through `DecayRule`. Plain Python floats throughout: a sum by `math.fsum` and one
operation at a time give the same bits on every machine, so that all ranks agree.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, get_args

from esdtool._version import __version__
from esdtool.analysis import Analysis, ModuleResult
from esdtool.assignment import Assignment, Default, Entry, Method, Source
from esdtool.errors import NothingToAnalyzeError, UsageError
from esdtool.modules.base import holds_several_matrices
from esdtool.modules.names import canonical_name
from esdtool.modules.patterns import compile_patterns
from esdtool.options import AssignName, Granularity, OptimizerName, ScoreName, Unlisted

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
    min_ratio: float = 0.67,
    max_ratio: float = 5.0,
    layers: Sequence[int | None] | None = None,
) -> list[float]:
    """Decay over base decay of each module, from the modules' scores (alpha: small = heavy tail = weak decay).

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
        ValueError: if a score is not finite or `layers` does not fit.
    """
    for score in scores:
        if not math.isfinite(score):
            raise ValueError(f"scores must be finite, not {score}")
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
    """How scores become ratios: everything but the scores themselves. Checked on construction."""

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
    """Scale the ratios so that their mean, weighted by number of parameters, is 1."""

    def __post_init__(self) -> None:
        """Refuse unknown names and contradictions.

        Raises:
            UsageError: with the option's name and its valid values.
        """
        for option, value, valid in (
            ("assignment", self.assign, get_args(AssignName)),
            ("optimizer", self.optimizer, get_args(OptimizerName)),
            ("granularity", self.granularity, get_args(Granularity)),
        ):
            if value not in valid:
                raise UsageError(f"unknown {option} {value!r}; choose from {', '.join(valid)}")
        if self.assign != "linear" and (self.min_ratio is not None or self.max_ratio is not None):
            raise UsageError(f"min-ratio and max-ratio belong to the linear assignment, not to {self.assign!r}")
        if self.assign == "sigmoid" and self.granularity == "layer":
            raise UsageError("sigmoid compares the modules of a layer: granularity 'layer' would make them all equal")
        if self.assign == "linear":
            _check_ratios(*self.ratios_range)

    @property
    def ratios_range(self) -> tuple[float, float]:
        """(s1, s2) in force."""
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
        """The ratio of each module.

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
        values = [score for score in scores if score is not None]
        groups: list[Hashable] = list(scored)
        if self.granularity == "layer":
            groups = [("outside", index) if layers[index] is None else layers[index] for index in scored]
        elif self.granularity == "role":
            groups = [roles[index] for index in scored]
        low, high = self.ratios_range
        found = decay_ratios(
            _group_means(values, groups),
            assign=self.assign,
            min_ratio=low,
            max_ratio=high,
            layers=[layers[index] for index in scored],
        )
        if self.normalize:
            found = _normalized(found, [sizes[index] for index in scored])
        ratios = [1.0] * len(scores)
        for index, ratio in zip(scored, found, strict=True):
            ratios[index] = ratio
        return ratios


def assign(
    analysis: Analysis,
    *,
    weight_decay: float = 0.1,
    optimizer: OptimizerName = "adamw",
    min_ratio: float | None = None,
    max_ratio: float | None = None,
    assign: AssignName = "linear",
    score: ScoreName = "alpha",
    fit: str | None = None,
    granularity: Granularity = "module",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    unlisted: Unlisted = "keep",
    normalize: bool = False,
) -> Assignment:
    """A module-wise weight-decay assignment from an analysis.

    Assigned are the modules of the numbered blocks (attention and MLP), or every module of the analysis if the
    model has no numbered blocks. The others, and those that `include` and `exclude` leave out, are named under
    `left_out` and fall under the file's default; minimum and maximum are taken over the assigned modules alone.
    A module that could not be scored gets the base decay, and its entry's `note` says why.

    Args:
        analysis: what `esdtool.analyze` returned, or `Analysis.from_json`.
        weight_decay: base decay (what uniform weight decay would be), finite, not negative.
        optimizer: `adamw` (decoupled decay) or `adam` (decay as L2 penalty): sets the published ratios.
        min_ratio: smallest decay over the base, of `linear`; default published (0.67).
        max_ratio: largest decay over the base, of `linear`; default published (5 for adamw, 3 for adam).
        assign: formula, see `decay_ratios`.
        score: what the decays follow: alpha, or a metric of the analysis.
        fit: estimator of alpha; default the analysis's first. It must be one that the analysis was made with.
        granularity: one decay per `module`, `layer` or `role`.
        include: regular expressions searched in parameter names; if given, exactly the matching modules are assigned.
        exclude: regular expressions searched in parameter names to leave out.
        unlisted: what the file says of all other parameters: `keep` the trainer's choice, `no-decay` or `base`.
        normalize: rescale so that the parameter-weighted mean decay of the assigned modules equals the base.

    Raises:
        UsageError: if an option has no such value, a pattern matches nothing, or the fit is not in the analysis.
        NothingToAnalyzeError: if no module is left that was scored.
    """
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise UsageError(f"weight-decay must be finite and not negative, not {weight_decay}")
    if score not in get_args(ScoreName):
        raise UsageError(f"unknown score {score!r}; choose from {', '.join(get_args(ScoreName))}")
    if unlisted not in get_args(Unlisted):
        raise UsageError(f"unknown choice for unlisted parameters {unlisted!r}; choose from keep, no-decay, base")
    rule = DecayRule(
        assign=assign,
        min_ratio=min_ratio,
        max_ratio=max_ratio,
        optimizer=optimizer,
        granularity=granularity,
        normalize=normalize,
    )
    fit = _fit_in(analysis, fit)
    modules, left_out = _choose(analysis, tuple(include), tuple(exclude))
    scores, notes = [], []
    for module in modules:
        value, note = _score_of(module, score, _alpha(module, fit, analysis))
        scores.append(value)
        notes.append(note)
    if all(value is None for value in scores):
        where = analysis.source.checkpoint
        detail = f"; {modules[0].name}: {notes[0]}" if modules else ""
        raise NothingToAnalyzeError(f"{where}: no module was scored, so there is nothing to assign{detail}")

    ratios = rule.ratios(
        scores,
        layers=[module.layer for module in modules],
        roles=[module.role for module in modules],
        sizes=[math.prod(module.shape) for module in modules],
    )
    names = _canonical([module.parameter for module in modules])
    low, high = rule.ratios_range if assign == "linear" else (None, None)
    return Assignment(
        created_by=f"esdtool {__version__}",
        source=Source(
            checkpoint=analysis.source.checkpoint,
            revision=analysis.source.revision,
            model_type=analysis.source.model_type,
        ),
        base_weight_decay=weight_decay,
        optimizer="l2" if optimizer == "adam" else "decoupled",
        method=Method(
            name="uniform" if assign == "uniform" else "alphadecay",
            score=score,
            fit=fit,
            assign=assign,
            min_ratio=low,
            max_ratio=high,
            granularity=granularity,
            normalize=normalize,
        ),
        default=Default.of(unlisted, weight_decay),
        parameters={
            name: Entry(
                weight_decay=weight_decay * ratio,
                ratio=ratio,
                alpha=_alpha(module, fit, analysis),
                score=None if score == "alpha" else value,
                role=module.role,
                layer=module.layer,
                shape=module.shape,
                note=note,
            )
            for name, module, ratio, value, note in zip(names, modules, ratios, scores, notes, strict=True)
        },
        left_out=left_out,
    )


def in_blocks(layers: Iterable[int | None]) -> list[bool]:
    """Which modules are assigned by default: those of numbered blocks; all of them if there are no such blocks.

    >>> in_blocks([None, 0, 1, None]), in_blocks([None, None])
    ([False, True, True, False], [True, True])
    """
    inside = [layer is not None for layer in layers]
    return inside if any(inside) else [True] * len(inside)


BASE_DECAY: Final = "base decay"
"""How the note of a module that could not be scored begins; the reason follows after a colon."""

OUTSIDE_BLOCKS: Final = "outside the numbered blocks; include it by name to assign it"
"""Why a module is left out by default."""


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
    """n f(a_i) / sum f(a_j), where f(a) = 0 at `bound`; values below it are marked by -1."""
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
    """Each value replaced by the mean of its group."""
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
    mean = math.fsum(ratio * size for ratio, size in zip(ratios, sizes, strict=True)) / sum(sizes)
    if mean == 0:
        raise UsageError("cannot normalize: all ratios are 0; choose a max-ratio above 0")
    return [ratio / mean for ratio in ratios]


def _fit_in(analysis: Analysis, fit: str | None) -> str:
    """The estimator to use.

    Raises:
        UsageError: if the analysis was made without it.
    """
    available = analysis.settings.fit
    if fit is None:
        return available[0]
    if fit not in available:
        raise UsageError(
            f"{analysis.source.checkpoint}: the analysis holds no fit {fit!r}, only {', '.join(available)}; "
            f"analyse again with --fit {fit}"
        )
    return fit


def _alpha(module: ModuleResult, fit: str, analysis: Analysis) -> float | None:
    return module.alpha if fit == analysis.settings.fit[0] else module.alphas.get(fit)


def _score_of(module: ModuleResult, score: ScoreName, alpha: float | None) -> tuple[float | None, str | None]:
    """(score, None), or (None, why there is none)."""
    if not module.ok:
        return None, f"{BASE_DECAY}: {module.status}"
    value: float | None
    if score == "alpha":
        value = alpha
    elif score == "alpha_weighted":
        exponent = module.log_spectral_norm
        value = None if alpha is None or exponent is None else alpha * exponent
    else:
        value = getattr(module, score)
    return value, None if value is not None else f"{BASE_DECAY}: no {score} by this estimator"


def _choose(
    analysis: Analysis, include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[ModuleResult], dict[str, str]]:
    """The modules to assign, and the others by canonical parameter name with the reason."""
    names = sorted(canonical_name(module.parameter) for module in analysis.modules)
    others = sorted(canonical_name(tensor.name) for tensor in analysis.skipped)
    includes = compile_patterns(include, names, option="--include", what="analysed parameter")
    excludes = compile_patterns(exclude, names + others, option="--exclude", what="analysed parameter")
    default = in_blocks(module.layer for module in analysis.modules)
    chosen: list[ModuleResult] = []
    left_out = {
        canonical_name(tensor.name): tensor.reason
        for tensor in analysis.skipped
        if holds_several_matrices(tensor.reason)
    }
    for module, is_default in zip(analysis.modules, default, strict=True):
        name = canonical_name(module.parameter)
        excluded = next((pattern.pattern for pattern in excludes if pattern.search(name)), None)
        if excluded is not None:
            left_out[name] = f"excluded by --exclude {excluded!r}"
        elif includes and not any(pattern.search(name) for pattern in includes):
            left_out[name] = "not matched by --include"
        elif not includes and not is_default:
            left_out[name] = OUTSIDE_BLOCKS
        else:
            chosen.append(module)
    return chosen, left_out


def _canonical(parameters: Sequence[str]) -> list[str]:
    """The names without the segments of wrappers, unless that would make two of them equal."""
    names = [canonical_name(parameter) for parameter in parameters]
    return names if len(set(names)) == len(names) else list(parameters)
