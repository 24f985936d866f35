"""An adapter merged into its base: what PEFT's `merge_and_unload` makes, tensor by tensor as it is read."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from esdtool.checkpoint.adapter import AdapterCheckpoint, Update
from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.errors import CheckpointError
from esdtool.names import module_path, without_root

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class MergedCheckpoint(Checkpoint):
    """The base's tensors, some of them with an update added or replaced."""

    base: Checkpoint = field(repr=False)
    adapter: AdapterCheckpoint = field(repr=False)
    updated: Mapping[str, tuple[str, ...]] = field(repr=False)
    """Names of the updates of a tensor."""
    replaced: Mapping[str, str] = field(repr=False)
    """Name in the adapter of a tensor that it holds whole."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor with its updates, float32 where there are some."""
        self.info(name)
        weight = self.adapter.read(self.replaced[name]) if name in self.replaced else self.base.read(name)
        for update in self.updated.get(name, ()):
            weight = self._added(weight.float(), update)
        return weight

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As `read`; an untouched tensor's other rows stay on disk."""
        if name in self.updated or name in self.replaced:
            return self.read(name)[start:stop]
        return self.base.read_rows(name, start, stop)

    def _added(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        update = self.adapter.updates[name]
        merged = weight + self.adapter.read(name)
        if update.magnitude is None:
            return merged
        # DoRA (Liu et al. 2024, arXiv 2402.09353): the direction is W + s B A, the length of each output its own.
        import torch

        axis = 0 if update.transposed else 1
        length: torch.Tensor = torch.linalg.vector_norm(merged, dim=axis, keepdim=True)
        magnitude = self.adapter.inner.read(update.magnitude).float().flatten()
        return merged * (magnitude.unsqueeze(axis) / length)


def merged(adapter: Checkpoint, base: Checkpoint) -> Checkpoint:
    """The base with an adapter's updates added, and the modules that the adapter holds whole in their place.

    Names may differ in outer prefixes such as `model.`; shapes must agree.

    Raises:
        CheckpointError: if the base does not hold a weight that the adapter changes.
    """
    assert isinstance(adapter, AdapterCheckpoint)
    index: dict[tuple[str, ...], list[TensorInfo]] = defaultdict(list)
    for info in base.tensors.values():
        index[_bare(info.name)].append(info)
    updated: dict[str, list[str]] = defaultdict(list)
    for name, update in adapter.updates.items():
        updated[_found(index, update, adapter, name, base)].append(name)
    replaced: dict[str, str] = {}
    added: dict[str, TensorInfo] = {}
    for name, info in adapter.tensors.items():
        if name in adapter.updates:
            continue
        matches = [other for other in index.get(_bare(name), []) if other.shape == info.shape]
        if len(matches) == 1:
            replaced[matches[0].name] = name
        elif name not in base.tensors:  # a new head
            replaced[name] = name
            added[name] = info
    tensors = {
        name: replace(info, dtype="float32", quantization=None, roundoff=None) if name in updated else info
        for name, info in base.tensors.items()
    }
    tensors |= {name: replace(adapter.tensors[source], name=name) for name, source in replaced.items()} | added
    return MergedCheckpoint(
        location=f"{base.location} + {adapter.location}",
        tensors=tensors,
        files=base.files,
        revision=base.revision,
        config=base.config,
        notes=(
            *base.notes,
            *adapter.notes,
            f"{base.location}: {len(updated)} weights with the updates of {adapter.location}"
            + (f", {len(replaced)} replaced" if replaced else ""),
        ),
        base=base,
        adapter=adapter,
        updated={name: tuple(names) for name, names in updated.items()},
        replaced=replaced,
    )


def _found(
    index: Mapping[tuple[str, ...], list[TensorInfo]],
    update: Update,
    adapter: AdapterCheckpoint,
    name: str,
    base: Checkpoint,
) -> str:
    """Name of the base's tensor that an update belongs to."""
    candidates = index.get(_bare(update.target), [])
    shape = adapter.tensors[name].shape
    fitting = [info.name for info in candidates if info.shape == shape]
    exact = [found for found in fitting if found == update.target]
    if len(exact or fitting) == 1:
        return (exact or fitting)[0]
    if candidates and not fitting:
        raise CheckpointError(
            f"{adapter.location}: the update of {update.target} is {list(shape)}, but in {base.location} that weight "
            f"is {list(candidates[0].shape)}: it is not the adapter's base"
        )
    if fitting:
        raise CheckpointError(
            f"{adapter.location}: {update.target} may be {fitting[0]} or {fitting[1]} in {base.location}"
        )
    near = difflib.get_close_matches(update.target, base.tensors, n=1)
    hint = f"; the nearest name is {near[0]!r}" if near else ""
    raise CheckpointError(
        f"{adapter.location}: changes {update.target!r}, which {base.location} does not hold{hint}; "
        "is it the adapter's base?"
    )


def _bare(name: str) -> tuple[str, ...]:
    """The path of a parameter's module without outer prefixes."""
    path = without_root(module_path(name))
    return path if name.endswith(".weight") else (*path, "")  # a bias is not its module's weight
