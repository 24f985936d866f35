"""Alphas of several checkpoints side by side: which module corresponds to which, and how far each has moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import PurePath
from statistics import fmean
from typing import Final

from esdtool._version import __version__
from esdtool.analysis.counterparts import Counterparts, find_counterparts
from esdtool.analysis.distances import Distances
from esdtool.analysis.document import Analysis
from esdtool.analysis.module_record import ModuleResult
from esdtool.analysis.verdict import alpha_words
from esdtool.comparison.document import (
    MOVED_MOST,
    CheckpointComparison,
    Compared,
    ComparedModule,
    ComparedRole,
    ComparisonSummary,
    PairSettings,
    Side,
    Unmatched,
    is_significant,
    largest,
)
from esdtool.errors import UsageError
from esdtool.spectra.estimator import load_estimator
from esdtool.spectra.options import FITS
from esdtool.support.words import dimensions

__all__ = [
    "CheckpointComparison",
    "Compared",
    "ComparedModule",
    "ComparedRole",
    "ComparisonSummary",
    "Side",
    "Unmatched",
    "compare_analyses",
    "is_significant",
    "largest",
    "short_labels",
]


def compare_analyses(
    analyses: Sequence[Analysis],
    *,
    distances: Sequence[Mapping[str, Distances]] = (),
    pairs: PairSettings | None = None,
) -> CheckpointComparison:
    """Put analyses side by side; the first is what the others are compared with.

    Modules are matched by name and shape, else by name without outer prefixes, else by block, role and expert.

    Args:
        analyses: two or more.
        distances: for each but the first, how far its modules are from the first one's, by the names that the first
            one has for them (`esdtool.analysis.pairs.measure_pairs`); empty where that is not known.
        pairs: how singular vectors were compared, where they were.

    Raises:
        UsageError: for fewer than two analyses, or where their alphas are of different estimators.
    """
    if len(analyses) < 2:
        raise UsageError("a comparison needs at least two checkpoints")
    labels = short_labels([analysis.source.checkpoint for analysis in analyses])
    first, others = analyses[0], analyses[1:]
    for label, other in zip(labels[1:], others, strict=True):
        if other.settings.fit[0] != first.settings.fit[0]:
            raise UsageError(
                f"alpha is by {first.settings.fit[0]} in {labels[0]}, but by {other.settings.fit[0]} in {label}: "
                "analyse both with the same --fit"
            )
    found = [find_counterparts(first.modules, other.modules) for other in others]
    known = distances or [{}] * len(others)
    modules = tuple(_row(module, first, others, found, known) for module in first.modules)
    matched = tuple(module for module in modules if any(side is not None for side in module.sides[1:]))
    return CheckpointComparison(
        created_by=f"esdtool {__version__}",
        checkpoints=tuple(_compared(label, analysis) for label, analysis in zip(labels, analyses, strict=True)),
        modules=matched,
        unmatched=tuple(_unmatched(analyses, found, labels)),
        pairs=pairs,
        notes=tuple(_notes(analyses)),
        summary=_summary(analyses, matched),
    )


def short_labels(names: Sequence[str]) -> list[str]:
    """Return the last parts of each path that tell it from the others; equal ones are numbered.

    >>> short_labels(["runs/a/final", "runs/b/final"])
    ['a/final', 'b/final']
    >>> short_labels(["run/step_10", "run/step_20/"]), short_labels(["x", "x"])
    (['step_10', 'step_20'], ['x (1)', 'x (2)'])
    """
    parts = [PurePath(name).parts or (name,) for name in names]
    distinct = dict.fromkeys(parts)
    length = 1
    while len({part[-length:] for part in distinct}) < len(distinct):
        length += 1
    labels = [str(PurePath(*part[-length:])) for part in parts]
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: position + 1].count(label)})"
        for position, label in enumerate(labels)
    ]


def _compared(label: str, analysis: Analysis) -> Compared:
    summary = analysis.summary
    return Compared(
        checkpoint=analysis.source.checkpoint,
        label=label,
        source=analysis.source,
        settings=analysis.settings,
        num_modules=summary.num_modules,
        num_scored=summary.num_scored,
        num_skipped=summary.num_skipped,
    )


def _row(
    module: ModuleResult,
    first: Analysis,
    others: Sequence[Analysis],
    found: Sequence[Counterparts[ModuleResult]],
    distances: Sequence[Mapping[str, Distances]],
) -> ComparedModule:
    sides: list[Side | None] = [_side(module, None, first.settings.fit[0], None)]
    for other, counterparts, known in zip(others, found, distances, strict=True):
        theirs = counterparts.pairs.get(module.name)
        fit = other.settings.fit[0]
        sides.append(None if theirs is None else _side(theirs, module, fit, known.get(module.name)))
    return ComparedModule(
        name=module.name,
        role=module.role,
        layer=module.layer,
        expert=module.expert,
        shape=module.shape,
        sides=tuple(sides),
    )


def _side(module: ModuleResult, first: ModuleResult | None, fit: str, distances: Distances | None) -> Side:
    difference = significance = None
    if first is not None and first.alpha is not None and module.alpha is not None:
        difference = module.alpha - first.alpha
        if first.alpha_stderr is not None and module.alpha_stderr is not None:
            error = math.hypot(first.alpha_stderr, module.alpha_stderr)
            significance = difference / error if error > 0 else None
    return Side(
        name=module.name,
        alpha=module.alpha,
        alpha_stderr=module.alpha_stderr,
        mp_alpha=module.mp_alpha,
        verdict=alpha_words(module, fit),
        num_eigs=module.num_eigs,
        difference=difference,
        significance=significance,
        distances=distances,
    )


def _unmatched(
    analyses: Sequence[Analysis], found: Sequence[Counterparts[ModuleResult]], labels: Sequence[str]
) -> list[Unmatched]:
    first = analyses[0]
    unmatched = []
    for other, counterparts, label in zip(analyses[1:], found, labels[1:], strict=True):
        for module in first.modules:
            if module.name in counterparts.pairs:
                continue
            wrong = counterparts.wrong_shape.get(module.name)
            reason = f"not in {label}"
            if wrong is not None:
                reason = f"shape {dimensions(module.shape)}, but {dimensions(wrong.shape)} in {label}"
            unmatched.append(Unmatched(checkpoint=labels[0], name=module.name, shape=module.shape, reason=reason))
        taken = {module.name for module in chain(counterparts.pairs.values(), counterparts.wrong_shape.values())}
        unmatched += [
            Unmatched(checkpoint=label, name=module.name, shape=module.shape, reason=f"not in {labels[0]}")
            for module in other.modules
            if module.name not in taken
        ]
    return unmatched


_COMMON_SETTINGS: Final = ("min_eigs", "spectrum", "fast", "split_fused", "include", "exclude")
"""Settings on which an analysis depends whatever its estimator is."""


def _notes(analyses: Sequence[Analysis]) -> list[str]:
    notes = []
    fit = analyses[0].settings.fit[0]
    # Analyses come from files: one may be by an estimator that is not here.
    own = load_estimator(fit).all_options if fit in FITS else ()
    for setting in (*own, *_COMMON_SETTINGS):
        values = [_text(getattr(analysis.settings, setting)) for analysis in analyses]
        if len(set(values)) > 1:
            notes.append(f"the analyses differ in {setting}: {', '.join(values)}")
    if len({analysis.source.base is None for analysis in analyses}) > 1:
        notes.append("some alphas are of weights, others of differences from a base: they are not comparable")
    writers = [analysis.created_by for analysis in analyses]
    if len(set(writers)) > 1:
        notes.append(f"the analyses are by different versions: {', '.join(writers)}")
    return notes


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _summary(analyses: Sequence[Analysis], modules: Sequence[ComparedModule]) -> ComparisonSummary:
    columns = [[module.sides[position] for module in modules] for position in range(len(analyses))]
    compared = [[side for side in column if side is not None and side.difference is not None] for column in columns]
    moved = [(abs(value), module.name) for module in modules if (value := module.largest_difference)]
    moved.sort(key=lambda found: -found[0])
    return ComparisonSummary(
        mean_alphas=tuple(analysis.summary.mean_alpha for analysis in analyses),
        mean_differences=tuple(
            fmean(side.difference or 0.0 for side in sides) if sides else None for sides in compared
        ),
        num_compared=tuple(
            len(sides) if position else sum(module.sides[0].alpha is not None for module in modules if module.sides[0])
            for position, sides in enumerate(compared)
        ),
        num_significant=tuple(sum(is_significant(side) for side in sides) for sides in compared),
        by_role=_by_role(analyses),
        moved_most=tuple(name for _, name in moved[:MOVED_MOST]),
    )


def _by_role(analyses: Sequence[Analysis]) -> tuple[ComparedRole, ...]:
    summaries = [{row.role: row for row in analysis.summary.by_role} for analysis in analyses]
    roles = dict.fromkeys(chain.from_iterable(summaries))
    return tuple(
        ComparedRole(
            role=role,
            counts=tuple(rows[role].count if role in rows else 0 for rows in summaries),
            mean_alphas=tuple(rows[role].mean_alpha if role in rows else None for rows in summaries),
        )
        for role in roles
    )
