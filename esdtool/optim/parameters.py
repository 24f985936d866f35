"""A live model's parameters under their canonical names, and which of them an assignment means."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from esdtool.assignment.document import Assignment, Entry
from esdtool.assignment.options import check_unlisted
from esdtool.checkpoint import Checkpoint
from esdtool.checkpoint.adapters.names import without_adapters
from esdtool.checkpoint.memory import MemoryCheckpoint, from_model
from esdtool.errors import AssignmentError, CheckpointError
from esdtool.names import canonical_name, reparametrised_names
from esdtool.support.words import first_of


@dataclass(frozen=True, kw_only=True)
class LiveModel:
    """The parameters of a model as its training sees them."""

    checkpoint: Checkpoint
    """Every parameter and buffer, for `select_modules`."""
    parameters: Mapping[str, nn.Parameter]
    """By name without wrappers' segments, in the order of `state_dict()`. A tied parameter appears under each name."""
    names: Mapping[nn.Parameter, tuple[str, ...]]
    """All names of each parameter, by identity, in the order of first appearance."""

    @property
    def distinct(self) -> dict[str, nn.Parameter]:
        """Every parameter once, under its first name."""
        return {names[0]: parameter for parameter, names in self.names.items()}

    def lookup(self, name: str) -> nn.Parameter | None:
        """Return the parameter of a name, with or without the segments of wrappers and of PEFT."""
        found = self.parameters.get(name)
        if found is None:
            found = self.parameters.get(canonical_name(name))
        return self._under_adapters.get(canonical_name(name)) if found is None else found

    @cached_property
    def _under_adapters(self) -> dict[str, nn.Parameter]:
        """The parameters of a model with adapters by the names that they have without them."""
        found: dict[str, nn.Parameter] = {}
        for name, parameter in self.parameters.items():
            plain = without_adapters(name)
            # Of a module that PEFT trains whole, the copy acts, and the original stays for comparison.
            if plain != name and (plain not in found or ".modules_to_save." in name):
                found[plain] = parameter
        return found


def live_model(model: nn.Module) -> LiveModel:
    """Look at a model, wrapped or not; nothing is copied.

    Raises:
        AssignmentError: if it has no parameters of its own (FSDP1 and DeepSpeed ZeRO-3 hide them).
    """
    try:
        checkpoint = from_model(model)
    except CheckpointError as error:
        raise AssignmentError(str(error)) from error
    assert isinstance(checkpoint, MemoryCheckpoint)
    parameters = {name: value for name, value in checkpoint.values.items() if isinstance(value, nn.Parameter)}
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(parameter, []).append(name)
    return LiveModel(
        checkpoint=checkpoint,
        parameters=parameters,
        names={parameter: tuple(found) for parameter, found in names.items()},
    )


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """An assignment's entries on a model's parameters."""

    decays: Mapping[nn.Parameter, float]
    """The decay of each listed parameter."""
    matched: tuple[str, ...]
    """Entries that found their parameter."""
    unmatched: tuple[str, ...]
    """Entries that name no parameter of the model."""
    conflicts: tuple[str, ...]
    """Entries of one tied parameter that contradict each other; in words. Such a parameter is not in `decays`."""


def resolve(model: LiveModel, assignment: Assignment, *, strict: bool, values: str = "decays") -> Resolution:
    """Find each entry's parameter.

    Args:
        model: the live model.
        assignment: names, shapes and values.
        strict: refuse what cannot be resolved.
        values: the kind of the values, for the messages.

    Raises:
        AssignmentError: if an entry's shape is not its parameter's; if `strict`, also if an entry names no parameter
            or two entries give one tied parameter different decays.
    """
    found: dict[nn.Parameter, list[str]] = {}
    matched: list[str] = []
    unmatched: list[str] = []
    for name, entry in assignment.parameters.items():
        parameter = model.lookup(name)
        if parameter is not None:
            # Quantised codes of a frozen base have a shape of their own.
            is_plain = parameter.is_floating_point()
            if entry.shape is not None and is_plain and entry.shape != tuple(parameter.shape):
                raise AssignmentError(
                    f"{name}: shape {list(entry.shape)} in the assignment, {list(parameter.shape)} in the model: "
                    "it was made for another model"
                )
            held = [parameter]
        else:
            held = _separate_members(name, assignment, model) or _reparametrised(name, entry, model)
        (matched if held else unmatched).append(name)
        for parameter in held:
            found.setdefault(parameter, []).append(name)
    if unmatched and strict:
        raise AssignmentError(_unknown(unmatched, model))

    decays: dict[nn.Parameter, float] = {}
    conflicts: list[str] = []
    for parameter, names in found.items():
        given = {name: assignment.parameters[name].weight_decay for name in names}
        if len(set(given.values())) == 1:
            decays[parameter] = given[names[0]]
            continue
        listed = ", ".join(f"{name}: {value:g}" for name, value in given.items())
        conflict = f"one tied parameter has several {values} ({listed})"
        if strict:
            raise AssignmentError(f"{conflict}; give all its names the same value, or list only one")
        conflicts.append(conflict)
    return Resolution(decays=decays, matched=tuple(matched), unmatched=tuple(unmatched), conflicts=tuple(conflicts))


def _separate_members(name: str, assignment: Assignment, model: LiveModel) -> list[nn.Parameter]:
    """Find the model's own parameters for the members of a fused one that it lacks; none unless it has them all."""
    members = assignment.members.get(name)
    if members is None:
        return []
    held = [model.lookup(f"{module}.weight") for module in members.members]
    return [] if None in held else [parameter for parameter in held if parameter is not None]


def _reparametrised(name: str, entry: Entry, model: LiveModel) -> list[nn.Parameter]:
    """Find the parameters in the place of a weight that the model normalises or masks, or names otherwise."""
    for names in reparametrised_names(canonical_name(name)):
        held = [parameter for other in names if (parameter := model.lookup(other)) is not None]
        # The direction v, or the original, has the shape of the weight.
        if len(held) == len(names) and (entry.shape is None or entry.shape == tuple(held[-1].shape)):
            return held
    return []


def unlisted_decay(assignment: Assignment, unlisted: str, ndim: int) -> float | None:
    """Return the decay of a parameter that the assignment does not list; None leaves it to the optimizer.

    `keep` follows the file's `default`, which may itself say to keep the trainer's choice.

    Raises:
        AssignmentError: for an unknown choice.
    """
    check_unlisted(unlisted, error=AssignmentError)
    if unlisted == "keep":
        return assignment.default.decay(ndim)
    return 0.0 if unlisted == "no-decay" else assignment.base_weight_decay


def warn_unmatched(resolution: Resolution) -> None:
    """Say once what a lenient application left out."""
    problems = [*(f"{name} is not in the model" for name in resolution.unmatched), *resolution.conflicts]
    if problems:
        warnings.warn(f"weight-decay assignment: {first_of(problems)}", stacklevel=3)


def _unknown(names: Sequence[str], model: LiveModel) -> str:
    hint = _prefix_hint(names[0], model)
    near = difflib.get_close_matches(names[0], model.parameters, n=1)
    if hint is None:
        hint = f"; the nearest name is {near[0]}" if near else ""
    return f"{first_of(names)} is not a parameter of the model{hint}; strict=False leaves such entries out"


def _prefix_hint(name: str, model: LiveModel) -> str | None:
    """Say which part of the model to pass, where a name and the model differ by outer segments alone."""
    outer, _, rest = name.partition(".")
    if model.lookup(rest) is not None:
        return f": the model has it as {rest}, so pass the whole model and not its part .{outer}"
    longer = next((each for each in model.parameters if each.endswith(f".{name}")), None)
    if longer is not None:
        part = longer.removesuffix(f".{name}")
        return f": the model has it as {longer}, so pass model.{part}, of which the assignment was made"
    return None
