"""An adapter's file, or a state dict with adapters in it, as weights: updates, or base weights with their updates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from esdtool.checkpoint.adapters.base import AdapterKind, Context, Group, UnfitError, Update
from esdtool.checkpoint.adapters.config import FILE_NAME, AdapterConfig, Scales, read_adapter_config
from esdtool.checkpoint.adapters.kinds import load_kinds
from esdtool.checkpoint.adapters.names import PEFT_PREFIX, SHARED, Spellings
from esdtool.checkpoint.adapters.unsupported import refusal_of_tensors, refusal_of_type
from esdtool.checkpoint.base import Checkpoint, TensorInfo, TrainedParameter
from esdtool.checkpoint.derived import DerivedCheckpoint, DerivedTensor, inherited, listing
from esdtool.errors import CheckpointError

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class AdapterCheckpoint(DerivedCheckpoint):
    """Weight updates, one tensor for each adapted module."""

    updates: Mapping[str, Update] = field(repr=False)
    """All updates by name, those included that only the base model makes complete."""


@dataclass(frozen=True, kw_only=True)
class UpdatedWeight(DerivedTensor):
    """A base weight with the update beside it in the same file."""

    base: str
    """Stored name of the base weight."""
    update: Update

    def read(self, source: Checkpoint) -> torch.Tensor:
        """Compute W + dW in float32."""
        return self.update.merged(source.read(self.base).float(), source)


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint holds weight updates rather than weights."""
    return isinstance(checkpoint, AdapterCheckpoint)


def adapter_weights(checkpoint: Checkpoint) -> Checkpoint:
    """Return what an adapter's tensors stand for; the checkpoint itself if it has no adapter.

    Of an adapter alone, each module's update is a tensor with the name (without PEFT's `base_model.model.`) and shape
    of its base weight. In a file with several adapters the adapter's name stands before `.weight`. Where the base
    weights are in the same file (a state dict saved from a live model), the tensor is the sum that acts. Parts of which
    no update can be made stay as they are, and a note names them.

    Raises:
        CheckpointError: if the adapter is of a kind that changes no matrix by an addition, or whose update is not
            computed, or its configuration is damaged.
    """
    groups, shared = _groups(checkpoint)
    refused = refusal_of_tensors(checkpoint.tensors)
    if not groups and refused is None and not _says_adapter(checkpoint):
        return checkpoint
    config = read_adapter_config(checkpoint)
    kind = None if config.peft_type is None else refusal_of_type(config.peft_type)
    if kind is None and refused is not None:
        kind = refused[0]
    if kind is not None:
        where = "" if refused is None else f" ({refused[1]})"
        raise CheckpointError(f"{checkpoint.location}: an adapter of the kind {kind.name}{where}: {kind.reason}")
    if not groups:
        return checkpoint
    found = _Found(checkpoint, config, groups, shared)
    return _view(found) if found.updates else found.unchanged()


@dataclass
class _Found:
    """The updates in a file."""

    checkpoint: Checkpoint
    config: AdapterConfig
    groups: tuple[Group, ...]
    shared: Mapping[str, str]
    updates: list[tuple[Group, Update]] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)
    """First tensor of a module of which no update can be made, and why."""

    def __post_init__(self) -> None:
        self.context = Context(
            checkpoint=self.checkpoint,
            config=self.config,
            scales=Scales(self.config, self.checkpoint.location),
            shared=self.shared,
            groups=self.groups,
        )
        for group in self.groups:
            kind = _kind_of(group, self.context)
            try:
                if kind is None:
                    raise UnfitError("without a fitting counterpart")
                update = kind.build(group, self.context)
            except UnfitError as error:
                self.lost[next(iter(group.parts.values()))] = str(error)
                continue
            self.kinds.add(kind.name)
            self.updates.append((group, update))

    def unchanged(self) -> Checkpoint:
        """Return the checkpoint as it is stored, with a note on what looks like an adapter."""
        notes = self.notes_on_lost()
        return replace(self.checkpoint, notes=(*self.checkpoint.notes, *notes)) if notes else self.checkpoint

    def notes_on_lost(self) -> list[str]:
        """Name the first module of which no update can be made."""
        if not self.lost:
            return []
        name, why = next(iter(self.lost.items()))
        count = f"the factors of {len(self.lost)} modules" if len(self.lost) > 1 else "an adapter's factors"
        return [f"{self.checkpoint.location}: left out {count}: {name}: {why}"]


def _says_adapter(checkpoint: Checkpoint) -> bool:
    return "peft_type" in checkpoint.config


def _groups(checkpoint: Checkpoint) -> tuple[tuple[Group, ...], dict[str, str]]:
    """(the parts of each module, what all modules share). Names that only look like a part are left out."""
    spellings = _spellings()
    groups: dict[tuple[str, str | None, int, bool], Group] = {}
    shared: dict[str, str] = {}
    loose: dict[tuple[str, str | None], list[tuple[str, str]]] = defaultdict(list)
    for name in checkpoint.tensors:
        parsed = spellings.parse(name)
        if parsed is None:
            continue
        if parsed.module == SHARED:
            shared[parsed.part] = name
        elif parsed.part in _COMPANIONS:
            loose[parsed.module, parsed.adapter].append((parsed.part, name))
        else:
            key = (parsed.module, parsed.adapter, parsed.depth, parsed.embedding)
            group = groups.setdefault(
                key,
                Group(
                    module=parsed.module,
                    stored_module=parsed.stored_module,
                    adapter=parsed.adapter,
                    depth=parsed.depth,
                    embedding=parsed.embedding,
                ),
            )
            group.parts[parsed.part] = name
    for group in groups.values():
        for part, name in loose.get((group.module, group.adapter), ()):
            group.parts[part] = name
    return tuple(groups.values()), shared


_COMPANIONS = frozenset({"alpha", "magnitude", "m"})
"""Parts that make no adapter by themselves: other models have tensors of such names."""


def _spellings() -> Spellings:
    return Spellings({ending: part for kind in reversed(load_kinds()) for ending, part in kind.endings.items()})


def _kind_of(group: Group, context: Context) -> AdapterKind | None:
    return next((kind for kind in load_kinds() if kind.claims(group, context)), None)


def _view(found: _Found) -> Checkpoint:
    checkpoint = found.checkpoint
    bases = [_base_of(group, update, checkpoint) for group, update in found.updates]
    several = len({group.adapter for group, _ in found.updates}) > 1
    # PEFT saves a base embedding beside its factors: only where all updates have their base is this a whole model.
    whole = all(bases)
    if whole and not several:
        return _merged_view(found, [base for base in bases if base is not None])
    updates: dict[str, Update] = {}
    for group, update in found.updates:
        name = update.info.name
        if several and group.adapter:
            stem, _, leaf = name.rpartition(".")
            name = f"{stem}.{group.adapter}.{leaf}"
        if name in checkpoint.tensors:
            stem, _, leaf = name.rpartition(".")
            name = f"{stem}.lora.{leaf}"
        updates[name] = replace(update, info=replace(update.info, name=name))
    derived = {name: update for name, update in updates.items() if not update.needs_base}
    incomplete = [name for update in updates.values() if update.needs_base for name in update.stored]
    renamed = _without_prefix(checkpoint, updates.values())
    notes = _notes(found, updates)
    if whole:
        notes.append(
            f"{checkpoint.location}: base weights and the updates of several adapters: which of them acts is not "
            "stored, so each is analysed by itself; merge one (merge_and_unload) to analyse the weights that act"
        )
    return AdapterCheckpoint(
        **inherited(checkpoint),
        tensors=listing(checkpoint, derived, renamed=renamed, hidden=(*incomplete, *found.shared.values())),
        notes=(*checkpoint.notes, *notes),
        inner=checkpoint,
        derived=derived,
        renamed=renamed,
        updates=updates,
    )


def _without_prefix(
    checkpoint: Checkpoint, updates: Iterable[DerivedTensor], *, shells: bool = False
) -> dict[str, str]:
    """Stored names by the names without PEFT's prefix and, if asked for, without the segments of its wrappers."""
    gone = {name for update in updates for name in update.stored}
    names: dict[str, str] = {}
    for name in checkpoint.tensors:
        if name not in gone:
            new = name.removeprefix(PEFT_PREFIX)
            while shells and ".base_layer." in new:
                new = new.replace(".base_layer.", ".")
            names[new] = name
    return {new: old for new, old in names.items() if new != old}


def _base_of(group: Group, update: Update, checkpoint: Checkpoint) -> str | None:
    """Stored name of the base weight beside a module's update; None if it is not in the file."""
    leaves = dict.fromkeys(["weight", "in_proj_weight", update.target.rpartition(".")[2]])
    candidates = [f"{group.stored_module}.{'base_layer.' * shells}{leaf}" for leaf in leaves for shells in (1, 2, 3, 0)]
    candidates.append(f"{group.stored_module}.linear.weight")  # LitGPT
    return next((name for name in candidates if name in checkpoint.tensors), None)


def _merged_view(found: _Found, bases: Sequence[str]) -> Checkpoint:
    """List the sums of base weights and updates, and everything else without the adapter's prefixes."""
    checkpoint = found.checkpoint
    derived: dict[str, DerivedTensor] = {}
    alone: list[str] = []
    for (_, update), base in zip(found.updates, bases, strict=True):
        info = checkpoint.tensors[base]
        fitting = update.fitted(info.shape)
        if fitting is None:
            alone.append(update.info.name)
            continue
        name = fitting.target
        derived[name] = UpdatedWeight(
            info=TensorInfo(
                name=name,
                shape=info.shape,
                dtype="float32",
                file=", ".join(dict.fromkeys((info.file, fitting.info.file))),
                trained=(TrainedParameter(name=base, shape=info.shape),),
            ),
            stored=(base, *fitting.stored),
            base=base,
            update=fitting,
        )
    replaced = _saved_modules(checkpoint)
    renamed = _without_prefix(checkpoint, derived.values(), shells=True) | replaced
    hidden = {name for name in checkpoint.tensors if ".original_module." in name} | set(found.shared.values())
    notes = [
        f"{checkpoint.location}: {len(derived)} weights with the updates of the adapter "
        f"({', '.join(sorted(found.kinds))}) that lies beside them",
        *_scale_notes(found),
        *found.notes_on_lost(),
    ]
    if alone:
        notes.append(f"{checkpoint.location}: left out {len(alone)} updates that fit no weight: {alone[0]}")
    return DerivedCheckpoint(
        **inherited(checkpoint),
        tensors=listing(checkpoint, derived, renamed=renamed, hidden=hidden if replaced else found.shared.values()),
        notes=(*checkpoint.notes, *notes),
        inner=checkpoint,
        derived=derived,
        renamed=renamed,
    )


def _saved_modules(checkpoint: Checkpoint) -> dict[str, str]:
    """Stored names, by the names that act, of modules that PEFT trains whole (`modules_to_save`)."""
    saved: dict[str, str] = {}
    for name in checkpoint.tensors:
        stem, marker, rest = name.partition(".modules_to_save.")
        _, _, leaf = rest.partition(".")
        if marker and leaf:
            saved[f"{stem.removeprefix(PEFT_PREFIX)}.{leaf}"] = name
    return saved


def _notes(found: _Found, updates: Mapping[str, Update]) -> list[str]:
    location = found.checkpoint.location
    complete = sum(not update.needs_base for update in updates.values())
    kinds = ", ".join(sorted(found.kinds))
    notes = [f"{location}: {_article(kinds)} {kinds} adapter: {complete} weight updates"] if complete else []
    if complete < len(updates):
        first = next(name for name, update in updates.items() if update.needs_base)
        notes.append(
            f"{location}: left out {len(updates) - complete} updates whose shape only the base tells: {first}; "
            "give --base"
        )
    notes += [*found.notes_on_lost(), *_scale_notes(found)]
    if any(update.magnitude is not None for update in updates.values()):
        notes.append(f"{location}: a DoRA adapter: alone, its direction B A is analysed; --base merges it in full")
    return notes


def _scale_notes(found: _Found) -> list[str]:
    if not found.context.guessed:
        return []
    return [
        f"{found.checkpoint.location}: no {FILE_NAME} that tells the scale: the scale is taken as 1. Alone it "
        "changes norms, not alphas; in a sum with the base it changes both"
    ]


def _article(word: str) -> str:
    return "an" if word[:1] in "AEIO" else "a"
