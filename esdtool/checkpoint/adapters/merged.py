"""An adapter merged into its base: what PEFT's `merge_and_unload` makes, tensor by tensor as it is read."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from esdtool.checkpoint.adapters.base import Update
from esdtool.checkpoint.adapters.checkpoint import AdapterCheckpoint
from esdtool.checkpoint.adapters.names import flat, is_flat
from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.derived import inherited
from esdtool.errors import CheckpointError
from esdtool.names import module_path, without_root

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class MergedCheckpoint(Checkpoint):
    """The base's tensors, some of them with an update added or replaced."""

    base: Checkpoint = field(repr=False)
    adapter: AdapterCheckpoint = field(repr=False)
    updated: Mapping[str, tuple[Update, ...]] = field(repr=False)
    """The updates of a tensor, each fitted to its shape."""
    replaced: Mapping[str, str] = field(repr=False)
    """Name in the adapter of a tensor that it holds whole."""

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor with its updates, float32 where there are some."""
        self.info(name)
        weight = self.adapter.read(self.replaced[name]) if name in self.replaced else self.base.read(name)
        for update in self.updated.get(name, ()):
            weight = update.merged(weight.float(), self.adapter.inner)
        return weight

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read some positions of the first dimension; those of an untouched tensor alone."""
        if name in self.updated or name in self.replaced:
            return self.read(name)[start:stop]
        return self.base.read_rows(name, start, stop)

    def fingerprint(self, name: str) -> str | None:
        """Return the base's identity of an untouched tensor; a sum has none."""
        return None if name in self.updated or name in self.replaced else self.base.fingerprint(name)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the base's factors of an untouched tensor; a sum has none."""
        if name in self.updated or name in self.replaced:
            return None
        return self.base.factors(name)


def merged(adapter: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Add an adapter's updates to the base, and put the modules that the adapter holds whole in their place.

    Names may differ in outer prefixes such as `model.`, or have lost their dots (kohya's); shapes must agree.

    Raises:
        CheckpointError: if the base does not hold a weight that the adapter changes.
    """
    assert isinstance(adapter, AdapterCheckpoint)
    index = _Index(base)
    updated: dict[str, list[Update]] = defaultdict(list)
    for update in adapter.updates.values():
        name, fitting = index.find(update, adapter)
        updated[name].append(fitting)
    replaced: dict[str, str] = {}
    added: dict[str, TensorInfo] = {}
    for name, info in adapter.tensors.items():
        if name in adapter.updates:
            continue
        matches = [other for other in index.by_path(name) if other.shape == info.shape]
        if len(matches) == 1:
            replaced[matches[0].name] = name
        elif name not in base.tensors:  # a new head
            replaced[name] = name
            added[name] = info
    tensors = {
        name: replace(info, dtype="float32", quantization=None, roundoff=None, rank=None) if name in updated else info
        for name, info in base.tensors.items()
    }
    tensors |= {name: replace(adapter.tensors[source], name=name) for name, source in replaced.items()} | added
    return MergedCheckpoint(
        **inherited(base)
        | {
            "location": f"{base.location} + {adapter.location}",
            # A rank that reads either file alone would wait for the others.
            "collective_reads": base.collective_reads or adapter.collective_reads,
        },
        tensors=tensors,
        notes=(
            *base.notes,
            *adapter.notes,
            f"{base.location}: {len(updated)} weights with the updates of {adapter.location}"
            + (f", {len(replaced)} replaced" if replaced else ""),
        ),
        base=base,
        adapter=adapter,
        updated={name: tuple(found) for name, found in updated.items()},
        replaced=replaced,
    )


class _Index:
    """The base's tensors by what an adapter may call them."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._paths: dict[tuple[str, ...], list[TensorInfo]] = defaultdict(list)
        self._flat: dict[str, list[TensorInfo]] = defaultdict(list)
        for info in base.tensors.values():
            self._paths[_bare(info.name)].append(info)
            self._flat[flat(info.name)].append(info)

    def by_path(self, name: str) -> Sequence[TensorInfo]:
        """Return the base's tensors of a name, outer prefixes aside."""
        return self._paths.get(_bare(name), ())

    def find(self, update: Update, adapter: Checkpoint) -> tuple[str, Update]:
        """(name of the base's tensor that an update belongs to, the update in its shape).

        Raises:
            CheckpointError: if there is none, or several.
        """
        candidates = self._candidates(update.target)
        fitting = [(info.name, found) for info in candidates if (found := update.fitted(info.shape)) is not None]
        exact = [pair for pair in fitting if pair[0] == update.target]
        if len(exact or fitting) == 1:
            return (exact or fitting)[0]
        base = self._base.location
        if candidates and not fitting:
            raise CheckpointError(
                f"{adapter.location}: the update of {update.target} is {list(update.info.shape)}, but in {base} that "
                f"weight is {list(candidates[0].shape)}: it is not the adapter's base"
            )
        if fitting:
            raise CheckpointError(
                f"{adapter.location}: {update.target} may be {fitting[0][0]} or {fitting[1][0]} in {base}"
            )
        near = difflib.get_close_matches(update.target, self._base.tensors, n=1)
        hint = f"; the nearest name is {near[0]!r}" if near else ""
        raise CheckpointError(
            f"{adapter.location}: changes {update.target!r}, which {base} does not hold{hint}; "
            "is it the adapter's base?"
        )

    def _candidates(self, target: str) -> Sequence[TensorInfo]:
        module = target.removesuffix(".weight")
        if is_flat(module):
            return self._flat.get(flat(module), ())
        # torch.nn.MultiheadAttention keeps the projections that LoRA adapts as its own parameter.
        return self.by_path(target) or self.by_path(f"{module}.in_proj_weight") or self.by_path(module)


def _bare(name: str) -> tuple[str, ...]:
    """Return the path of a parameter's module without outer prefixes."""
    return without_root(module_path(name))
