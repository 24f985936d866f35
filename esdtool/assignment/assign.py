"""From an analysis to a weight-decay assignment: one decay for each parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

from esdtool._version import __version__
from esdtool.analysis.document import Analysis, ModuleResult
from esdtool.assignment.document import Assignment, Default, Method, Source
from esdtool.assignment.fused import Member, merge_members
from esdtool.assignment.options import AssignName, Granularity, OptimizerName, ScoreName, Unlisted
from esdtool.assignment.rule import DecayRule
from esdtool.assignment.scope import BASE_DECAY, Patterns, Scope, choose, names_of
from esdtool.errors import NothingToAnalyzeError, UsageError
from esdtool.modules import SkipKind
from esdtool.names import canonical_name


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
    A module that could not be scored gets the base decay, and its entry's `note` says why. A parameter that holds
    several modules has the mean of their ratios, weighted by their numbers of parameters; `members` names them.

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
        include: regular expressions searched in the names of parameters and modules; if given, exactly the matching
            modules are assigned.
        exclude: regular expressions searched in the same names, to leave out.
        unlisted: what the file says of all other parameters: `keep` the trainer's choice, `no-decay` or `base`.
        normalize: rescale so that the parameter-weighted mean decay of the assigned modules equals the base.

    Raises:
        UsageError: if an option has no such value, a pattern matches nothing, or the fit is not in the analysis.
        NothingToAnalyzeError: if no module is left that was scored.
    """
    check_options(weight_decay=weight_decay, score=score, unlisted=unlisted)
    rule = DecayRule(
        assign=assign,
        min_ratio=min_ratio,
        max_ratio=max_ratio,
        optimizer=optimizer,
        granularity=granularity,
        normalize=normalize,
    )
    if analysis.source.base is not None:
        raise UsageError(
            f"{analysis.source.checkpoint}: the analysis is of differences from {analysis.source.base}; weight decays "
            "follow the spectra of weights: analyse without --base"
        )
    fit = _fit_in(analysis, fit)
    scope = _scope(analysis, include, exclude)
    modules, left_out = scope.assigned, _left_out(analysis, scope)
    scores, notes = [], []
    for module in modules:
        value, note = _score_of(module, score, _alpha(module, fit, analysis))
        scores.append(value)
        notes.append(note)
    if all(value is None for value in scores):
        where = analysis.source.checkpoint
        name, why = (modules[0].name, notes[0]) if modules else next(iter(left_out.items()), ("", ""))
        detail = f": {name}: {why}" if name else ""
        what = "no module was scored" if modules else "no module is left"
        raise NothingToAnalyzeError(f"{where}: {what}, so there is nothing to assign{detail}")

    ratios = rule.ratios(
        scores,
        layers=[module.layer for module in modules],
        roles=[module.role for module in modules],
        sizes=[math.prod(module.shape) for module in modules],
    )
    parameters = merge_members(
        [
            Member(
                name=module.name,
                parameter=parameter,
                stored_shape=shape,
                size=math.prod(module.shape),
                ratio=ratio,
                alpha=_alpha(module, fit, analysis),
                score=None if score == "alpha" else value,
                role=module.role,
                layer=module.layer,
                note=note,
            )
            for module, ratio, value, note in zip(modules, ratios, scores, notes, strict=True)
            for parameter, shape in _parameters(module)
        ],
        weight_decay,
    )
    found = dict(zip(_canonical(list(parameters)), parameters.values(), strict=True))
    left_out = {name: reason for name, reason in left_out.items() if name not in found}
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
        parameters={name: entry for name, (entry, _) in found.items()},
        members={name: members for name, (_, members) in found.items() if members is not None},
        left_out=left_out,
    )


def check_options(*, weight_decay: float, score: str, unlisted: str) -> None:
    """Refuse what no analysis could be assigned with, before one is made; `DecayRule` checks the rest.

    Raises:
        UsageError: with the option's name.
    """
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise UsageError(f"weight-decay must be finite and not negative, not {weight_decay}")
    if score not in get_args(ScoreName):
        raise UsageError(f"unknown score {score!r}; choose from {', '.join(get_args(ScoreName))}")
    if unlisted not in get_args(Unlisted):
        raise UsageError(f"unknown choice for unlisted parameters {unlisted!r}; choose from keep, no-decay, base")


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


def _scope(analysis: Analysis, include: Sequence[str], exclude: Sequence[str]) -> Scope[ModuleResult]:
    patterns = Patterns.checked(
        include,
        exclude,
        (name for module in analysis.modules for name in names_of(module)),
        others=(canonical_name(tensor.name) for tensor in analysis.skipped),
    )
    return choose(analysis.modules, patterns)


def _left_out(analysis: Analysis, scope: Scope[ModuleResult]) -> dict[str, str]:
    """Why parameters are not assigned that hold weight matrices, by canonical name."""
    unsplit = {
        canonical_name(tensor.name): tensor.reason
        for tensor in analysis.skipped
        if tensor.kind is SkipKind.SEVERAL_MATRICES
    }
    return unsplit | {canonical_name(left.module.parameter): left.reason for left in scope.left_out}


def _parameters(module: ModuleResult) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of the parameters that decay a module: its own, or those that its weight is computed from.

    Of a normalised weight g v / |v| the decay of g shrinks the weight just as its own decay would, and that of v keeps
    the length at which the step of v takes effect. As in any optimizer, both have the module's.
    """
    if module.trained is None:
        return [(module.parameter, module.stored_shape)]
    return [(parameter.name, parameter.shape) for parameter in module.trained]


def _canonical(parameters: Sequence[str]) -> list[str]:
    """The names without the segments of wrappers, unless that would make two of them equal."""
    names = [canonical_name(parameter) for parameter in parameters]
    return names if len(set(names)) == len(names) else list(parameters)
