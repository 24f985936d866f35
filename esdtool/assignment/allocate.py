"""From an analysis to values of several quantities: what `esdtool assign --for` does."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from esdtool._version import __version__
from esdtool.assignment.allocation import Allocation, ParameterValues, QuantityRecord, ValueDetail
from esdtool.assignment.assign import assign_in_scope, canonical_names, reasons_left_out, scope_of
from esdtool.assignment.assign_options import AssignOptions
from esdtool.assignment.document import Assignment, Default, Members, Origin
from esdtool.assignment.fused import joined_roles, members_of
from esdtool.assignment.quantities import QUANTITY_NAMES, WEIGHT_DECAY
from esdtool.assignment.quantity import End, Given, Needs, Unit, checked_settings, load_quantity
from esdtool.assignment.weights import RowReader, row_reader
from esdtool.errors import NothingToAnalyzeError, UsageError
from esdtool.modules import SkipKind
from esdtool.names import canonical_name
from esdtool.support.words import listed

if TYPE_CHECKING:
    from esdtool.analysis.document import Analysis
    from esdtool.analysis.module_record import ModuleResult
    from esdtool.assignment.scope import Scope

_ENDS: Final[dict[SkipKind, Literal["token-embedding", "output-head"]]] = {
    SkipKind.TOKEN_EMBEDDING: "token-embedding",
    SkipKind.OUTPUT_HEAD: "output-head",
}


@dataclass(frozen=True, kw_only=True)
class AllocateOptions:
    """The quantities that are asked for, and how each is made."""

    settings: Mapping[str, Any]
    """The settings of each quantity by its name; `AssignOptions` for weight decay."""
    include: tuple[str, ...] = ()
    """Regular expressions on names of parameters and modules; with any, exactly the matching modules take part."""
    exclude: tuple[str, ...] = ()
    """Regular expressions on the same names: what is left out."""

    @classmethod
    def of(
        cls,
        quantities: Sequence[str],
        values: Mapping[str, Mapping[str, Any]],
        *,
        decays: AssignOptions,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> AllocateOptions:
        """Check what a user asks for.

        Args:
            quantities: names of quantities.
            values: settings by quantity and name; text is read as the setting's type.
            decays: how weight decays are made, if they are asked for.
            include: see `AllocateOptions.include`.
            exclude: see `AllocateOptions.exclude`.

        Raises:
            UsageError: for an unknown quantity, setting or value, and settings of a quantity that is not asked for.
        """
        check_quantities(quantities)
        strangers = [name for name in values if name not in quantities]
        if strangers:
            raise UsageError(f"settings are given for {strangers[0]}, which is not asked for: add --for {strangers[0]}")
        settings = {
            name: decays if name == WEIGHT_DECAY else checked_settings(name, dict(values.get(name, {})))
            for name in QUANTITY_NAMES
            if name in quantities
        }
        return cls(settings=settings, include=tuple(include), exclude=tuple(exclude))

    @property
    def needs(self) -> Needs:
        """What the analysis must hold, besides metrics; the fit of the weight decays aside."""
        found = [
            load_quantity(name).needs(settings) for name, settings in self.settings.items() if name != WEIGHT_DECAY
        ]
        fits = [fit for needs in found for fit in needs.fits]
        return Needs(
            fits=tuple(dict.fromkeys(fits)),
            eigenvalues=any(needs.eigenvalues for needs in found),
            weights=any(needs.weights for needs in found),
        )


def check_quantities(quantities: Sequence[str]) -> None:
    """Refuse names that are no quantities, and none at all.

    Raises:
        UsageError: with the valid names.
    """
    for name in quantities:
        if name not in QUANTITY_NAMES:
            raise UsageError(f"unknown quantity {name!r}; choose from {', '.join(QUANTITY_NAMES)}")
    if not quantities:
        raise UsageError(f"no quantity was asked for; choose from {', '.join(QUANTITY_NAMES)}")


@dataclass(frozen=True, kw_only=True)
class ScopedAllocation:
    """Values of several quantities, and which modules have none."""

    allocation: Allocation
    scope: Scope[ModuleResult]


def allocate(analysis: Analysis, options: AllocateOptions) -> ScopedAllocation:
    """Make values of several quantities from an analysis.

    The modules of the model's blocks take part, or all modules of a model without blocks, as for weight decay.
    A parameter that holds several modules has one value: it is made from the means of their numbers, weighted by size.

    Args:
        analysis: with the fits, and the eigenvalues, that `options.needs` names.
        options: what to make.

    Raises:
        UsageError: if a pattern matches nothing, the analysis lacks what a quantity rests on, or is of an adapter or
            of differences; or if a budget cannot be kept.
        CheckpointError: if a quantity reads the weights again, and they are not there.
        NothingToAnalyzeError: if no module is left that was scored.
    """
    source = analysis.source
    names = [name for name in options.settings if name != WEIGHT_DECAY]
    scope = scope_of(analysis, options.include, options.exclude)
    _check(analysis, scope, options.needs, names)
    decays: Assignment | None = None
    if WEIGHT_DECAY in options.settings:
        decays = assign_in_scope(analysis, options.settings[WEIGHT_DECAY]).assignment
    left_out = reasons_left_out(analysis, scope)
    units, computed = _units(analysis, scope, row_reader(analysis.source) if options.needs.weights else None)
    ends = _ends(analysis, options)
    given: dict[str, dict[str, Given]] = defaultdict(dict)
    for name in names:
        quantity = load_quantity(name)
        for parameter, found in quantity.assign(units, ends, options.settings[name]).items():
            given[parameter][quantity.key] = found

    listed_names = [
        *(unit.parameter for unit in units),
        *(end.parameter for end in ends),
        *(decays or _NONE).parameters,
    ]
    parameters = {
        name: _entry(
            name, given.get(name, {}), units={unit.parameter: unit for unit in units}, ends=ends, decays=decays
        )
        for name in dict.fromkeys(listed_names)
        if name in given or name in (decays or _NONE).parameters
    }
    base = decays.base_weight_decay if decays is not None else None
    allocation = Allocation(
        created_by=f"esdtool {__version__}",
        source=Origin(checkpoint=source.checkpoint, revision=source.revision, model_type=source.model_type),
        base_weight_decay=base,
        optimizer="decoupled" if decays is None else decays.optimizer,
        method=None if decays is None else decays.method,
        default=Default() if decays is None else decays.default,
        quantities={name: _record(name, settings) for name, settings in options.settings.items()},
        parameters=parameters,
        members=_members(units) | ({} if decays is None else decays.members),
        left_out={
            name: reason
            for name, reason in ({} if decays is not None else computed | left_out).items()
            if name not in parameters
        }
        | (
            {}
            if decays is None
            else {name: reason for name, reason in decays.left_out.items() if name not in parameters}
        ),
    )
    return ScopedAllocation(allocation=allocation, scope=scope)


_NONE = Assignment(base_weight_decay=0.0, parameters={})


def _check(analysis: Analysis, scope: Scope[ModuleResult], needs: Needs, names: Sequence[str]) -> None:
    """Refuse an analysis that does not hold what the quantities rest on."""
    where = analysis.source.checkpoint
    if analysis.source.base is not None:
        raise UsageError(f"{where}: the analysis is of differences from {analysis.source.base}: analyse without --base")
    if not names:
        return
    updates = [module for module in analysis.modules if module.rank is not None or module.trained == ()]
    if updates and len(updates) == len(analysis.modules):
        raise UsageError(
            f"{where}: an adapter has no {listed(names)} of its own: its factors are not the model's weights; give the "
            "model, or the model with the adapter merged in"
        )
    lacking = [fit for fit in needs.fits if fit not in analysis.settings.fit]
    if lacking:
        raise UsageError(
            f"{where}: the analysis holds no fit {lacking[0]!r}, only {', '.join(analysis.settings.fit)}; give the "
            "checkpoint instead, or analyse again with " + " ".join(f"--fit {fit}" for fit in lacking)
        )
    if needs.eigenvalues and scope.assigned and not analysis.esds:
        raise UsageError(
            f"{where}: the quantity rests on whole spectra, which an analysis file does not hold: give the checkpoint"
        )
    if not any(module.ok for module in scope.assigned):
        raise NothingToAnalyzeError(f"{where}: no module was scored, so there is nothing to assign")


def _units(
    analysis: Analysis, scope: Scope[ModuleResult], reader: RowReader | None
) -> tuple[list[Unit], dict[str, str]]:
    """Gather the parameters that take part, and name those whose weights are computed from others."""
    groups: dict[str, list[ModuleResult]] = defaultdict(list)
    computed = {}
    for module in scope.assigned:
        if module.trained is None:
            groups[module.parameter].append(module)
        else:
            name = canonical_name(module.parameter)
            computed[name] = "its weight is computed from other parameters"
    names = canonical_names(list(groups))
    units = [
        Unit(
            parameter=name,
            shape=modules[0].stored_shape,
            modules=tuple(modules),
            eigenvalues=tuple(analysis.esds.get(module.name) for module in modules),
            read_rows=tuple if reader is None else functools.partial(reader, modules),
        )
        for name, modules in zip(names, groups.values(), strict=True)
    ]
    return units, computed


def _ends(analysis: Analysis, options: AllocateOptions) -> list[End]:
    """List the token embeddings and output heads, unless the user chose modules by name."""
    if options.include:
        return []
    return [
        End(parameter=canonical_name(tensor.name), shape=tensor.shape, role=_ENDS[tensor.kind])
        for tensor in analysis.skipped
        if tensor.kind in _ENDS and len(tensor.shape) == 2
    ]


def _members(units: Iterable[Unit]) -> dict[str, Members]:
    found = {unit.parameter: members_of([module.name for module in unit.modules]) for unit in units}
    return {name: members for name, members in found.items() if members is not None}


def _record(name: str, settings: Any) -> QuantityRecord:
    if name == WEIGHT_DECAY:
        return QuantityRecord(key="weight_decay", method="AlphaDecay", source="arXiv 2506.14562")
    quantity = load_quantity(name)
    return QuantityRecord(
        key=quantity.key, method=quantity.method, source=quantity.source, settings=settings.model_dump(mode="json")
    )


def _entry(
    name: str,
    given: Mapping[str, Given],
    *,
    units: Mapping[str, Unit],
    ends: Sequence[End],
    decays: Assignment | None,
) -> ParameterValues:
    """Put the values of one parameter together."""
    values: dict[str, Any] = {key: found.value for key, found in given.items()}
    details = {
        key: ValueDetail(ratio=found.ratio, score=found.score, source=found.source) for key, found in given.items()
    }
    decay = None if decays is None else decays.parameters.get(name)
    if decay is not None:
        values |= {"weight_decay": decay.weight_decay, "alpha": decay.alpha, "note": decay.note}
        details = {"weight_decay": ValueDetail(ratio=decay.ratio, score=decay.score)} | details
    unit = units.get(name)
    if unit is not None:
        place: dict[str, Any] = {
            "role": joined_roles(module.role for module in unit.modules),
            "layer": unit.layer,
            "shape": unit.shape,
        }
    elif decay is not None:
        place = {"role": decay.role, "layer": decay.layer, "shape": decay.shape}
    else:
        end = next(end for end in ends if end.parameter == name)
        place = {"role": end.role, "layer": None, "shape": end.shape}
    return ParameterValues(**values, **place, details=details)
