"""Tensors that are computed from stored ones when they are read: products of factors, normalised or masked weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from esdtool.checkpoint.base import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class DerivedTensor(ABC):
    """One tensor of the catalogue that is not stored as it is."""

    info: TensorInfo
    """Entry of the tensor in the catalogue."""
    stored: tuple[str, ...]
    """Names of the stored tensors that it is computed from, in whose place it is listed."""

    @abstractmethod
    def read(self, source: Checkpoint) -> torch.Tensor:
        """Compute the whole tensor, of shape `info.shape`.

        Raises:
            CheckpointError: if the data cannot be read.
        """

    def read_rows(self, source: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Compute positions `start` to `stop` of the first dimension."""
        return self.read(source)[start:stop]

    def factors(self, source: Checkpoint) -> tuple[torch.Tensor, torch.Tensor] | None:  # noqa: ARG002
        """Return the factors that `Checkpoint.factors` describes, in float64; None without `TensorInfo.rank`."""
        return None


@dataclass(kw_only=True)
class DerivedCheckpoint(Checkpoint):
    """A checkpoint with derived tensors in the place of what they are computed from."""

    inner: Checkpoint = field(repr=False)
    """The checkpoint as it is stored."""
    derived: Mapping[str, DerivedTensor] = field(repr=False)
    """Derived tensors by name."""
    renamed: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Stored name of a tensor that is listed under another one."""

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, computed if it is derived."""
        self.info(name)
        tensor = self.derived.get(name)
        return self.inner.read(self.renamed.get(name, name)) if tensor is None else tensor.read(self.inner)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read some positions of the first dimension of a tensor, computed if it is derived."""
        info = self.info(name)
        tensor = self.derived.get(name)
        if tensor is None:
            return self.inner.read_rows(self.renamed.get(name, name), start, stop)
        first, last, _ = slice(start, stop).indices(info.shape[0])
        return tensor.read_rows(self.inner, first, max(first, last))

    def stored_bytes(self, name: str) -> int:
        """Return the bytes of a tensor as it is stored, or of what it is computed from."""
        tensor = self.derived.get(name)
        names = (self.renamed.get(name, name),) if tensor is None else tensor.stored
        return sum(self.inner.stored_bytes(stored) for stored in names if stored in self.inner.tensors)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the factors of a derived tensor, or those of the stored one."""
        tensor = self.derived.get(name)
        if tensor is None:
            return self.inner.factors(self.renamed.get(name, name))
        return None if self.info(name).rank is None else tensor.factors(self.inner)


def listing(
    inner: Checkpoint,
    derived: Mapping[str, DerivedTensor],
    *,
    renamed: Mapping[str, str] | None = None,
    hidden: Iterable[str] = (),
) -> dict[str, TensorInfo]:
    """List a checkpoint's tensors with derived ones in the place of what they are computed from.

    Args:
        inner: the checkpoint as it is stored.
        derived: what to add, by name.
        renamed: stored name by new name, for tensors that stay.
        hidden: stored tensors that go, besides those of the derived ones.
    """
    gone = {name for tensor in derived.values() for name in tensor.stored} | set(hidden)
    new_names = {old: new for new, old in (renamed or {}).items()}
    kept = {new_names.get(name, name): info for name, info in inner.tensors.items() if name not in gone}
    return {name: replace(info, name=name) for name, info in kept.items()} | {
        name: tensor.info for name, tensor in derived.items()
    }


def inherited(inner: Checkpoint) -> dict[str, Any]:
    """Return the fields that a view of a checkpoint takes over from it; tensors and notes are the view's own."""
    return {
        "location": inner.location,
        "files": inner.files,
        "revision": inner.revision,
        "config": inner.config,
        "collective_reads": inner.collective_reads,
        "adapter_config": inner.adapter_config,
        "folder": inner.folder,
    }
