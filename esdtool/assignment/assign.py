"""From an analysis to a weight-decay assignment: one decay for each parameter."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from esdtool._version import __version__
from esdtool.analysis.document import Analysis
from esdtool.analysis.module_record import ModuleResult
from esdtool.assignment.assign_options import AssignOptions
from esdtool.assignment.document import Assignment, Default, Method, Origin
from esdtool.assignment.fused import Member, merge_members
from esdtool.assignment.options import AssignName, Granularity, OptimizerName, ScoreName, Unlisted
from esdtool.assignment.remarks import geometry_remark
from esdtool.assignment.rule import DecayRule
from esdtool.assignment.scope import BASE_DECAY, Patterns, Scope, choose, names_of
from esdtool.assignment.scores import checked_score, score_value
from esdtool.errors import NothingToAnalyzeError, UsageError
from esdtool.modules import SkipKind
from esdtool.names import canonical_name

_LOG = logging.getLogger(__name__)


def assign(
    analysis: Analysis,
    *,
    weight_decay: float = AssignOptions.weight_decay,
    optimizer: OptimizerName = DecayRule.optimizer,
    min_ratio: float | None = DecayRule.min_ratio,
    max_ratio: float | None = DecayRule.max_ratio,
    assign: AssignName = DecayRule.assign,
    score: ScoreName = AssignOptions.score,
    fit: str | None = AssignOptions.fit,
    granularity: Granularity = DecayRule.granularity,
    include: Sequence[str] = AssignOptions.include,
    exclude: Sequence[str] = AssignOptions.exclude,
    unlisted: Unlisted = AssignOptions.unlisted,
    normalize: bool = DecayRule.normalize,
) -> Assignment:
    """Make a module-wise weight-decay assignment from an analysis.

    Assigned are the modules of the model's blocks (attention and MLP), or every module of the analysis if the
    model has no blocks. The others, and those that `include` and `exclude` leave out, are named under
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
        score: what the decays follow: alpha, or another number of `esdtool.assignment.scores`.
        fit: estimator of alpha; default the analysis's first. It must be one that the analysis was made with.
        granularity: one decay per `module`, `layer` or `role`.
        include: regular expressions searched in the names of parameters and modules; if given, exactly the matching
            modules are assigned.
        exclude: regular expressions searched in the same names, to leave out.
        unlisted: what the file says of all other parameters: `keep` the trainer's choice, `no-decay` or `base`.
        normalize: rescale so that the parameter-weighted mean decay of the assigned modules equals the base.

    The logger warns if more than a tenth of the modules lie outside the blocks and get no decay of their own, if most
    assigned modules are like random matrices.

    Raises:
        UsageError: if an option has no such value, a pattern matches nothing, or the fit is not in the analysis.
        NothingToAnalyzeError: if no module is left that was scored.
    """
    options = AssignOptions(
        weight_decay=weight_decay,
        rule=DecayRule(
            assign=assign,
            min_ratio=min_ratio,
            max_ratio=max_ratio,
            optimizer=optimizer,
            granularity=granularity,
            normalize=normalize,
        ),
        score=score,
        fit=fit,
        include=tuple(include),
        exclude=tuple(exclude),
        unlisted=unlisted,
    )
    found = assign_in_scope(analysis, options, prefix="")
    if found.scope.is_surprising:
        _LOG.warning("%s: %s", analysis.source.checkpoint, found.scope.remark)
    if (remark := geometry_remark(analysis, found.assignment)) is not None:
        _LOG.warning("%s: %s", analysis.source.checkpoint, remark)
    return found.assignment


@dataclass(frozen=True, kw_only=True)
class ScopedAssignment:
    """An assignment, and which modules it leaves out."""

    assignment: Assignment
    scope: Scope[ModuleResult]


def assign_in_scope(analysis: Analysis, options: AssignOptions, *, prefix: str = "--") -> ScopedAssignment:
    """Make an assignment, and tell which modules it leaves out.

    Args:
        analysis: of a checkpoint.
        options: as the user gave them.
        prefix: what stands before the names of options in the words for the user: nothing in Python.

    Raises:
        UsageError: if a pattern matches nothing, the fit is not in the analysis, the analysis is of differences, or a
            decay would be infinite.
        NothingToAnalyzeError: if no module is left that was scored.
    """
    source = analysis.source
    if source.base is not None:
        raise UsageError(
            f"{source.checkpoint}: the analysis is of differences from {source.base}; weight decays "
            "follow the spectra of weights: analyse without --base"
        )
    if analysis.settings.sample_layers is not None:
        raise UsageError(
            f"{source.checkpoint}: the analysis is of a sample of its layers, and each module needs a decay: analyse "
            "without --sample-layers"
        )
    fit = _fit_in(analysis, options.fit)
    scope = scope_of(analysis, options.include, options.exclude, prefix=prefix)
    modules, left_out = scope.assigned, reasons_left_out(analysis, scope)
    alphas = [_alpha(module, fit, analysis) for module in modules]
    scores = [_score_of(module, options.score, alpha) for module, alpha in zip(modules, alphas, strict=True)]
    if all(value is None for value, _ in scores):
        raise NothingToAnalyzeError(_nothing(analysis, scope, scores, left_out))

    rule, base = options.rule, options.weight_decay
    ratios = rule.ratios(
        [value for value, _ in scores],
        layers=[module.layer for module in modules],
        roles=[module.role for module in modules],
        sizes=[math.prod(module.shape) for module in modules],
    )
    if not math.isfinite(base * max(ratios)):
        raise UsageError(f"weight-decay {base:g} times the ratio {max(ratios):g} is more than a number can hold")
    parameters = merge_members(
        [
            Member(
                name=module.name,
                parameter=parameter,
                stored_shape=shape,
                size=math.prod(module.shape),
                ratio=ratio,
                alpha=alpha,
                score=None if options.score == "alpha" else value,
                role=module.role,
                layer=module.layer,
                status=status,
            )
            for module, ratio, alpha, (value, status) in zip(modules, ratios, alphas, scores, strict=True)
            for parameter, shape in parameters_of(module)
        ],
        base,
    )
    found = dict(zip(canonical_names(list(parameters)), parameters.values(), strict=True))
    low, high = rule.ratios_range if rule.assign == "linear" else (None, None)
    assignment = Assignment(
        created_by=f"esdtool {__version__}",
        source=Origin(checkpoint=source.checkpoint, revision=source.revision, model_type=source.model_type),
        base_weight_decay=base,
        optimizer="l2" if rule.optimizer == "adam" else "decoupled",
        method=Method(
            name="uniform" if rule.assign == "uniform" else "alphadecay",
            score=options.score,
            fit=fit,
            assign=rule.assign,
            min_ratio=low,
            max_ratio=high,
            granularity=rule.granularity,
            normalize=rule.normalize,
            control=rule.control,
        ),
        default=Default.of(options.unlisted, base),
        parameters={name: entry for name, (entry, _) in found.items()},
        members={name: members for name, (_, members) in found.items() if members is not None},
        left_out={name: reason for name, reason in left_out.items() if name not in found},
    )
    return ScopedAssignment(assignment=assignment, scope=scope)


def _fit_in(analysis: Analysis, fit: str | None) -> str:
    """Choose the estimator to use.

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


def _score_of(module: ModuleResult, score: ScoreName, alpha: float | None) -> tuple[float | None, str]:
    """Score a module: (score, `ok`), or (None, why there is none)."""
    if not module.ok:
        return None, module.status
    return checked_score(score, score_value(score, alpha, module), is_estimated=module.spectrum == "slq")


def _nothing(
    analysis: Analysis,
    scope: Scope[ModuleResult],
    scores: Sequence[tuple[float | None, str]],
    left_out: dict[str, str],
) -> str:
    """Say why there is nothing to assign, with the first module as an example."""
    what, detail = "no module is left", ""
    if scope.assigned:
        what, detail = "no module was scored", f": {scope.assigned[0].name}: {BASE_DECAY}: {scores[0][1]}"
    elif left_out:
        name, reason = next(iter(left_out.items()))
        detail = f": {name}: {reason}"
    return f"{analysis.source.checkpoint}: {what}, so there is nothing to assign{detail}"


def scope_of(
    analysis: Analysis, include: Sequence[str], exclude: Sequence[str], *, prefix: str = "--"
) -> Scope[ModuleResult]:
    """Decide which modules of an analysis take part.

    Args:
        analysis: of a checkpoint.
        include: regular expressions, as the user gave them.
        exclude: regular expressions, as the user gave them.
        prefix: what stands before the names of options in the words for the user: nothing in Python.

    Raises:
        UsageError: if an expression is none or matches nothing.
    """
    patterns = Patterns.checked(
        include,
        exclude,
        (name for module in analysis.modules for name in names_of(module)),
        others=(canonical_name(tensor.name) for tensor in analysis.skipped),
        prefix=prefix,
    )
    return choose(analysis.modules, patterns)


def reasons_left_out(analysis: Analysis, scope: Scope[ModuleResult]) -> dict[str, str]:
    """Return the reason why each parameter with a weight matrix is not assigned, by canonical name."""
    unsplit = {
        canonical_name(tensor.name): tensor.reason
        for tensor in analysis.skipped
        if tensor.kind is SkipKind.SEVERAL_MATRICES
    }
    return unsplit | {canonical_name(left.module.parameter): left.reason for left in scope.left_out}


def parameters_of(module: ModuleResult) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of the parameters that decay a module: its own, or those that its weight is computed from.

    Of a normalised weight g v / |v| the decay of g shrinks the weight just as its own decay would, and that of v keeps
    the length at which the step of v takes effect. As in any optimizer, both have the module's.
    """
    if module.trained is None:
        return [(module.parameter, module.stored_shape)]
    return [(parameter.name, parameter.shape) for parameter in module.trained]


def canonical_names(parameters: Sequence[str]) -> list[str]:
    """Take the segments of wrappers out of the names, unless that would make two of them equal."""
    names = [canonical_name(parameter) for parameter in parameters]
    return names if len(set(names)) == len(names) else list(parameters)
