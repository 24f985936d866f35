"""Choose what a monitor looks at in a live model: its trained weights, and the updates of its adapters."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from esdtool.assignment.scope import Patterns, names_of
from esdtool.checkpoint import Checkpoint
from esdtool.checkpoint.adapters.checkpoint import AdapterCheckpoint
from esdtool.errors import AssignmentError, NothingToAnalyzeError
from esdtool.modules import WeightModule, select_modules
from esdtool.modules.model_code import kinds_of
from esdtool.optim.adapters import Adapters, trained_adapters
from esdtool.optim.live_scores import Measure, Operands
from esdtool.optim.measurements import Held
from esdtool.optim.parameters import LiveModel
from esdtool.spectra.options import LOW_RANK_MIN_EIGS, ScoreOptions


@dataclass(frozen=True, kw_only=True)
class UpdateMeasure(Measure):
    """A function that computes the score of one module, of a weight or of an adapter's update."""

    adapters: Adapters

    def operands(self, parameter: nn.Parameter) -> Operands:
        """List a weight, or all factors of the update that `parameter` is the first factor of."""
        factors = self.adapters.factors.get(parameter)
        return super().operands(parameter) if factors is None else tuple(factor.detach() for factor in factors)

    def matrices(self, module: WeightModule, operands: Operands) -> Sequence[torch.Tensor]:
        """Return the matrices whose eigenvalues are the module's ESD."""
        if module.parameter not in self.adapters.stored:
            return super().matrices(module, operands)
        return self.adapters.matrices(module, operands)

    def options_of(self, module: WeightModule) -> ScoreOptions:
        """Return the options of a module: a product of low rank has few eigenvalues by construction."""
        if module.rank is None:
            return self.options
        return replace(self.options, min_eigs=min(self.options.min_eigs, LOW_RANK_MIN_EIGS))


@dataclass(frozen=True, kw_only=True)
class Monitored:
    """The modules that a monitor looks at."""

    held: Held
    """Modules by the parameter that holds them, updates of adapters by the first of their factors."""
    measure: Measure
    """The function that computes their numbers."""
    skipped: Mapping[str, str]
    """Weight matrices that are left out, each with the reason."""

    @property
    def modules(self) -> tuple[WeightModule, ...]:
        """All modules, parameter by parameter."""
        return tuple(module for modules in self.held.values() for module in modules)


def monitored(live: LiveModel, measure: Measure, *, include: Sequence[str], exclude: Sequence[str]) -> Monitored:
    """Choose the weight matrices that training changes. Of adapters on a frozen model these are the updates.

    Args:
        live: the model.
        measure: the function that computes the numbers of a weight.
        include: regular expressions on names; if given, only matching matrices are looked at.
        exclude: regular expressions on names to leave out.

    Raises:
        UsageError: for a pattern that matches nothing.
        AssignmentError: if the weights have no data.
        CheckpointError: if the model trains adapters whose updates cannot be computed.
        NothingToAnalyzeError: if no matrix is left.
    """
    adapters = trained_adapters(live)
    checkpoint = live.checkpoint if adapters is None else adapters.checkpoint
    selection = select_modules(
        checkpoint.tensors.values(),
        config=live.checkpoint.config,
        include=include,
        kinds=functools.partial(kinds_of, live.checkpoint),
        prefix="",
    )
    known = [*checkpoint.tensors, *(name for module in selection.modules for name in names_of(module))]
    patterns = Patterns.checked(include, exclude, known, prefix="", what="tensor name")
    held: dict[nn.Parameter, tuple[WeightModule, ...]] = {}
    names: dict[nn.Parameter, str] = {}
    skipped: dict[str, str] = {}
    for module in selection.modules:
        name = module.parameter
        if reason := _not_wanted(module, patterns):
            skipped[name] = reason
            continue
        stored = name if adapters is None else adapters.stored.get(name, (_stored(checkpoint, name),))[0]
        parameter = live.parameters.get(stored)
        if parameter is None:
            skipped[name] = "a buffer, not a parameter"
        elif not parameter.requires_grad:
            skipped[name] = "frozen: requires_grad is False"
        elif names.setdefault(parameter, name) != name:
            skipped[name] = f"tied to {names[parameter]}"
        elif parameter.is_meta:
            raise AssignmentError(f"{name}: no data (meta device): load the weights before SpectralMonitor is built")
        else:
            held[parameter] = (*held.get(parameter, ()), module)
    if not held:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:2])
        raise NothingToAnalyzeError(
            "the model has no weight matrix that SpectralMonitor could follow" + (f" ({reasons})" if reasons else "")
        )
    if adapters is not None:
        measure = UpdateMeasure(
            score=measure.score, options=measure.options, device=measure.device, full=measure.full, adapters=adapters
        )
    return Monitored(held=held, measure=measure, skipped=skipped)


def _not_wanted(module: WeightModule, patterns: Patterns) -> str | None:
    """Say which of the user's expressions leaves a module out; None if none does."""

    def matches(expressions: Iterable[re.Pattern[str]]) -> bool:
        return any(expression.search(name) for expression in expressions for name in names_of(module))

    if matches(patterns.exclude):
        return "matched by exclude"
    return "not matched by include" if patterns.include and not matches(patterns.include) else None


def _stored(checkpoint: Checkpoint, name: str) -> str:
    assert isinstance(checkpoint, AdapterCheckpoint)
    return checkpoint.renamed.get(name, name)
