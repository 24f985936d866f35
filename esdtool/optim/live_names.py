"""Names in a checkpoint's file to names in the transformers model that loads it.

transformers renames and fuses weights as it loads them: experts that the file holds one by one become one stacked
parameter, towers of multimodal models get other prefixes, a base model's names gain or lose one. The map is
transformers' own, asked for the model at hand: no table is kept here.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from esdtool.assignment.document import Assignment, Entry, Members
from esdtool.assignment.fused import AGGREGATE, mean_entry
from esdtool.errors import AssignmentError, MissingExtraError, UsageError
from esdtool.names import WRAPPERS, canonical_name
from esdtool.support.words import first_of

RENAMED = "renamed"
"""`Members.aggregate` of an entry whose parameter only has another name in the file."""

_TOO_OLD = "this version of transformers does not say how it renames weights as it loads them; esdtool knows 5.x"


def live_names(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each name in a file, the model's parameters that its values go into.

    Args:
        model: a transformers model, wrapped or not; on the meta device if need be. Of any other model only names
            that it has itself are found.
        names: parameter names as the file has them.

    Returns:
        Names of live parameters by file name: one, or several where the loader splits a tensor. Names without a
        counterpart are not in it.
    """
    parameters = _parameter_names(model)
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        if canonical_name(name) in parameters:
            found[name] = (canonical_name(name),)
    inner = _transformers_model(model)
    if inner is None or len(found) == len(names):
        return found
    loader = _Loader(inner)
    for name in names:
        if name not in found:
            targets = tuple(target for target in loader.targets(canonical_name(name)) if target in parameters)
            if targets:
                found[name] = targets
    return found


def with_live_names(assignment: Assignment, model: nn.Module, *, strict: bool = True) -> Assignment:
    """Return the assignment under the names of a live transformers model.

    Several entries that end in one parameter become one, with the mean of their decays weighted by their numbers of
    parameters; `members` names them. Where others of the parameter's tensors are left out (`--exclude`), it is the
    mean of those that are not, as for a live model. An entry that is only renamed keeps its numbers.

    Raises:
        AssignmentError: if `strict` and an entry has no counterpart. Otherwise such entries keep their names.
    """
    everything = live_names(model, [*assignment.parameters, *assignment.left_out])
    targets = {name: found for name, found in everything.items() if name in assignment.parameters}
    lost = [name for name in assignment.parameters if name not in targets]
    if lost and strict:
        raise AssignmentError(f"{first_of(lost)} has no counterpart in {type(model).__name__}: is it the same model?")
    sources: dict[str, list[str]] = defaultdict(list)
    for name in assignment.parameters:
        for target in targets.get(name, (name,)):
            sources[target].append(name)
    elsewhere = {name: found for name, found in everything.items() if name in assignment.left_out}
    incomplete = {target for found in elsewhere.values() for target in found}
    shapes = {canonical_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    order = {name: position for position, name in enumerate(shapes)}
    entries: dict[str, Entry] = {}
    members: dict[str, Members] = {}
    for target in sorted(sources, key=lambda name: order.get(name, len(order))):
        names = sources[target]
        entries[target] = _joined(
            target,
            [assignment.parameters[name] for name in names],
            shapes.get(target),
            incomplete=target in incomplete,
        )
        held = _members(assignment, target, names)
        if held is not None:
            members[target] = held
    left_out = {new: reason for name, reason in assignment.left_out.items() for new in elsewhere.get(name, (name,))}
    return assignment.model_copy(
        update={
            "parameters": entries,
            "members": members,
            "left_out": {name: reason for name, reason in left_out.items() if name not in entries},
        }
    )


def fitted(assignment: Assignment, model: nn.Module) -> Assignment:
    """Return the assignment as it is, if the model has a parameter of each name; else under the live names."""
    if (
        _parameter_names(model).issuperset(map(canonical_name, assignment.parameters))
        or _transformers_model(model) is None
    ):
        return assignment
    return with_live_names(assignment, model, strict=False)


def meta_model(config: Mapping[str, Any], *, location: str) -> nn.Module:
    """Return the transformers model of a config.json, without weights.

    Args:
        config: what config.json holds.
        location: the checkpoint, for messages.

    Raises:
        MissingExtraError: without transformers.
        UsageError: if there is no configuration, or transformers does not know the model by itself. Code that comes
            with a checkpoint is never run.
    """
    import torch

    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("the live names of a model", "transformers") from error
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UsageError(f"{location}: no config.json with a model_type, so the live model's names are not known")
    kind = _model_class(config, location)
    try:
        settings = transformers.AutoConfig.for_model(**_plain(config))
        with torch.device("meta"):
            if kind is None:
                model: nn.Module = transformers.AutoModel.from_config(settings, trust_remote_code=False)
            else:
                model = kind(settings)
    # Whatever is wrong with a configuration shows as any kind of error in the model's own code.
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UsageError(
            f"{location}: transformers {transformers.__version__} cannot build its model_type {model_type!r}"
            + (f": {reason[0]}" if reason else "")
        ) from error
    return model


def _model_class(config: Mapping[str, Any], location: str) -> Any:
    """Return the class that `architectures` names; None if it names none.

    Raises:
        UsageError: if transformers has no model of that name. The file chooses the name, so nothing but a model may be
            called by it.
    """
    import transformers

    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else named
    if not name:
        return None
    try:
        kind = getattr(transformers, name)
        if issubclass(kind, transformers.PreTrainedModel):
            return kind
    # No string, no attribute, no class, or a module that cannot be imported here.
    except (TypeError, AttributeError, ImportError, RuntimeError):
        pass
    remedy = "it needs the checkpoint's own code" if "auto_map" in config else "it may need another version"
    raise UsageError(
        f"{location}: transformers {transformers.__version__} has no model {name!r}, which config.json names: "
        f"{remedy}, so the live model's names are not known"
    )


def _plain(value: Any) -> Any:
    """Turn what transformers writes for an infinity, `{"__float__": "Infinity"}`, into numbers."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: _plain(v) for k, v in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _parameter_names(model: nn.Module) -> set[str]:
    return {canonical_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}


def _is_transformers(model: object) -> bool:
    # Of the class: torch.compile's wrapper and PEFT's pass on the attributes of what they hold.
    return hasattr(type(model), "base_model_prefix")


def _transformers_model(model: nn.Module) -> Any:
    """Return the PreTrainedModel inside wrappers; None for any other model."""
    inner: Any = model
    while inner is not None and not _is_transformers(inner):
        inner = next((child for name in WRAPPERS if (child := inner._modules.get(name)) is not None), None)
    return inner


def _untouched(model: Any) -> Any:
    """Return the model as transformers builds it, without weights.

    transformers finds a model's map by names of classes and modules. FSDP2 gives the classes other names, and wrappers
    inside the model the modules.
    """
    import torch

    classes = {type(module) for module in model.modules() if _is_transformers(module)}
    if not any(_of_torch(kind) for kind in classes) and all(
        canonical_name(name) == name for name, _ in model.named_parameters()
    ):
        return model
    kind = next(kind for kind in type(model).__mro__ if not _of_torch(kind))
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(model.config))
    # A subclass of the user's may need more than a configuration; then the model at hand must do.
    except Exception:
        return model


def _of_torch(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "torch"


class _Loader:
    """The names that transformers gives a file's tensors on loading."""

    def __init__(self, model: Any) -> None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        except ImportError as error:
            raise AssignmentError(_TOO_OLD) from error
        model = _untouched(model)
        transforms = get_model_conversion_mapping(model)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        # All that is asked of the state dict is which names it has.
        self._names = {name: True for name, _ in model.named_parameters(remove_duplicate=False)}
        self._prefix = model.base_model_prefix
        self._rename = rename_source_key

    def targets(self, name: str) -> list[str]:
        """Return all names that a tensor of the file may have, those that the model does not have included."""
        renamed, pattern = self._rename(name, self._renamings, self._converters, self._prefix, self._names)
        found = [renamed]
        for converter in self._converters:
            if pattern is not None and pattern in converter.source_patterns and len(converter.target_patterns) > 1:
                first, *others = converter.target_patterns
                found += [renamed.replace(first, other) for other in others]
        return found


def _joined(target: str, entries: Sequence[Entry], shape: tuple[int, ...] | None, *, incomplete: bool) -> Entry:
    """Return one entry from those of the tensors that a parameter is made of.

    Args:
        target: the parameter's name.
        entries: at least one.
        shape: the parameter's, if known.
        incomplete: whether other tensors of the parameter are left out of the assignment.

    Raises:
        AssignmentError: if they have more weights than the parameter, or fewer and none is left out.
    """
    first = entries[0]
    if len(entries) == 1:
        # A part of a tensor, or the tensor in another form: the shape is the live one. Any other is a wrong model's.
        whole = math.prod(first.shape or ())
        if shape is None or first.shape is None:
            return first
        fits = whole % math.prod(shape) == 0 or (incomplete and whole < math.prod(shape))
        return first.model_copy(update={"shape": shape}) if fits else first
    sizes = [math.prod(entry.shape) if entry.shape else 1 for entry in entries]
    expected = sum(sizes) if shape is None or not all(entry.shape for entry in entries) else math.prod(shape)
    if sum(sizes) > expected or (sum(sizes) < expected and not incomplete):
        raise AssignmentError(
            f"{target} has {expected} weights in the model, its {len(entries)} entries {sum(sizes)}: "
            "the assignment was made for another model"
        )
    return mean_entry(entries, sizes, shape=shape)


def _members(assignment: Assignment, target: str, names: Sequence[str]) -> Members | None:
    """Return the tensors that make up a live parameter, or None if it is one of the file under the same name."""
    if len(names) == 1:
        known = assignment.members.get(names[0])
        return known or (None if names[0] == target else Members.of(RENAMED, (names[0],)))
    held: list[str] = []
    for name in names:
        known = assignment.members.get(name)
        held += known.members if known else [name.removesuffix(".weight")]
    return Members.of(AGGREGATE, tuple(held))
