"""Rows and columns of an analysis, the same in the terminal and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from esdtool.analysis.document import Analysis, RoleSummary
from esdtool.analysis.module_record import ModuleResult
from esdtool.analysis.verdict import verdict_words
from esdtool.modules import WeightModule
from esdtool.modules.identification import IdentifiedBy
from esdtool.modules.skipped import SkipKind
from esdtool.report.tables.distances import DistanceColumn, distance_columns
from esdtool.report.tables.experts import Experts, fold_experts
from esdtool.support.words import dimensions

_Row = TypeVar("_Row")

_SORT: dict[str, Callable[[ModuleResult], Any]] = {
    "name": lambda module: module.name,
    "role": lambda module: module.role,
    "layer": lambda module: -1 if module.layer is None else module.layer,
    "alpha": lambda module: module.alpha,
    "ks": lambda module: module.ks_distance,
    "stable-rank": lambda module: module.stable_rank,
    "lambda-max": lambda module: module.lambda_max,
}


@dataclass(frozen=True, kw_only=True)
class Column(Generic[_Row]):
    """One column of a table."""

    heading: str
    cell: Callable[[_Row], str]
    """Plain text: neither markup of a terminal nor of a page."""
    is_text: bool = False
    """Words stand left, numbers right."""


@dataclass(frozen=True, kw_only=True)
class Rows(Generic[_Row]):
    """The content of a table, and its title."""

    title: str
    rows: tuple[_Row, ...]


def module_rows(analysis: Analysis, *, sort: str, top: int | None, experts: Experts) -> Rows[ModuleResult]:
    """The modules in the order asked for, experts folded unless all are wanted."""
    modules = list(analysis.modules) if experts == "all" else fold_experts(analysis.modules)
    if sort != "order":
        modules.sort(key=missing_last(_SORT[sort]))
    folded = len(modules) < len(analysis.modules)
    title = f"{_subject(analysis)}: alpha by {analysis.settings.fit[0]}"
    return cut(modules, top=top, title=title, folded=folded)


def cut(modules: Sequence[_Row], *, top: int | None, title: str, folded: bool) -> Rows[_Row]:
    """The first rows, and a title that says what is not shown."""
    shown = modules if top is None else modules[:top]
    if folded:
        title += ", experts averaged by layer"
    if len(shown) < len(modules):
        title += f", {len(shown)} of {len(modules)} modules"
    return Rows(title=title, rows=tuple(shown))


def missing_last(key: Callable[[_Row], Any]) -> Callable[[_Row], tuple[bool, Any]]:
    """A sort key that puts rows without a number last."""
    return lambda row: (key(row) is None, 0 if key(row) is None else key(row))


def module_columns(analysis: Analysis, *, narrow: bool) -> list[Column[ModuleResult]]:
    """The columns of the module table; `narrow` leaves out what can be spared."""
    fit = analysis.settings.fit

    def other(name: str) -> Callable[[ModuleResult], str]:
        return lambda module: format_number(module.alphas.get(name), ".3f")

    place: list[Column[ModuleResult]] = [
        Column(heading="role", cell=lambda module: module.role, is_text=True),
        Column(heading="layer", cell=lambda module: format_layer(module.layer)),
    ]
    # Only where something is estimated: a dash is an exact alpha.
    estimated = Column[ModuleResult](
        heading="slq +-", cell=lambda module: format_number(module.alpha_half_width, ".3f")
    )
    doubtful = Column[ModuleResult](heading="identified by", cell=doubt, is_text=True)
    law = Column[ModuleResult](heading="best law", cell=lambda module: module.best_law or "-", is_text=True)
    truncation = Column[ModuleResult](
        heading="Lambda", cell=lambda module: format_number(module.truncation_lambda, ".3g")
    )
    rest: list[Column[ModuleResult]] = [
        Column(heading="KS", cell=lambda module: format_number(module.ks_distance, ".3f")),
        Column(heading="stable rank", cell=lambda module: format_number(module.stable_rank, ".1f")),
        Column(heading="lambda_max", cell=lambda module: format_number(module.lambda_max, ".4g")),
    ]
    distances = [
        Column[ModuleResult](heading=found.heading, cell=_distance(found))
        for found in distance_columns(module.distances for module in analysis.modules)
    ]
    return [
        Column(heading="module", cell=lambda module: module.name, is_text=True),
        *([] if narrow else place),
        Column(heading="shape", cell=lambda module: dimensions(module.shape)),
        Column(heading="alpha", cell=lambda module: format_number(module.alpha, ".3f")),
        Column(heading="+-", cell=lambda module: format_number(module.alpha_stderr, ".2f")),
        *([estimated] if any(module.alpha_ci for module in analysis.modules) else []),
        *([truncation] if fit[0] == "tpl" and not narrow else []),
        *(
            column
            for name in fit[1:]
            for column in (
                Column(heading=name, cell=other(name)),
                *([truncation] if name == "tpl" and not narrow else []),
            )
        ),
        Column(heading="null", cell=lambda module: format_number(module.mp_alpha, ".2f")),
        *([] if narrow else rest),
        *distances,
        *([doubtful] if any(map(doubt, analysis.modules)) else []),
        *([law] if any(module.best_law for module in analysis.modules) and not narrow else []),
        Column(heading="verdict", cell=lambda module: verdict_words(module, fit[0]), is_text=True),
    ]


def _distance(column: DistanceColumn) -> Callable[[ModuleResult], str]:
    return lambda module: column.cell(module.distances)


def doubt(module: ModuleResult | WeightModule) -> str:
    """Say how a module was identified where that leaves a doubt, and what else the tensor may hold; else nothing."""
    how = IdentifiedBy.SHAPE.value if module.identified_by is IdentifiedBy.SHAPE else None
    return "; ".join(filter(None, (how, module.note)))


ROLE_COLUMNS: tuple[Column[RoleSummary], ...] = (
    Column(heading="role", cell=lambda row: row.role, is_text=True),
    Column(heading="modules", cell=lambda row: str(row.count)),
    Column(heading="mean", cell=lambda row: f"{row.mean_alpha:.3f}"),
    Column(heading="spread", cell=lambda row: f"{row.std_alpha:.3f}"),
    Column(heading="min", cell=lambda row: f"{row.min_alpha:.3f}"),
    Column(heading="max", cell=lambda row: f"{row.max_alpha:.3f}"),
    Column(heading="null", cell=lambda row: format_number(row.mean_mp_alpha, ".3f")),
)


class Skipped(Protocol):
    """Whatever is left out: a tensor of an analysis or of a plan, or a module without a counterpart."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> SkipKind: ...

    @property
    def reason(self) -> str: ...


def skipped_rows(tensors: Iterable[Skipped]) -> list[tuple[int, str, str]]:
    """List (count, name, reason) of skipped tensors.

    Those that differ only in an index share a row, as do all norms and biases, which come last.
    """
    return [
        (len(members), members[0].name if len(members) == 1 else pattern or "(--json lists them)", reason)
        for reason, pattern, members in skipped_groups(tensors)
    ]


_Skipped = TypeVar("_Skipped", bound=Skipped)


def skipped_groups(tensors: Iterable[_Skipped]) -> list[tuple[str, str, list[_Skipped]]]:
    """List (reason, pattern, members) of skipped tensors that differ only in an index.

    All norms and biases are one group, which comes last and has no pattern.
    """
    groups: dict[tuple[bool, str, str], list[_Skipped]] = {}
    for tensor in tensors:
        is_vector = tensor.kind is SkipKind.VECTOR
        pattern = "" if is_vector else re.sub(r"(?<![^.])\d+(?![^.])", "*", tensor.name)
        groups.setdefault((is_vector, tensor.reason, pattern), []).append(tensor)
    ordered = sorted(groups.items(), key=lambda group: group[0][0])
    return [(reason, pattern, members) for (_, reason, pattern), members in ordered]


def format_number(value: float | None, spec: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, spec)


def format_layer(layer: int | None) -> str:
    """A block's index, or a dash outside blocks."""
    return "-" if layer is None else str(layer)


def _subject(analysis: Analysis) -> str:
    """Name what was analysed, for a title."""
    source = analysis.source
    return source.checkpoint if source.base is None else f"{source.checkpoint} minus {source.base}"
