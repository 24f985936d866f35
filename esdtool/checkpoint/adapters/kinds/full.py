"""LyCORIS' full differences: the update itself, `NAME.diff`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esdtool.checkpoint.adapters.base import AdapterKind, Context, Group, Update
from esdtool.checkpoint.base import Checkpoint


@dataclass(frozen=True, kw_only=True)
class _FullUpdate(Update):
    """A difference that is stored as it is."""

    difference: str

    def delta(self, source: Checkpoint) -> torch.Tensor:
        """Read the difference."""
        return source.read(self.difference).double()


def _build(group: Group, context: Context) -> Update:
    difference = group.parts["difference"]
    return _FullUpdate(
        info=context.info(group, context.shape(difference), rank=None),
        stored=(difference,),
        target=f"{group.module}.weight",
        difference=difference,
    )


def _claims(group: Group, context: Context) -> bool:
    return "difference" in group.parts and context.checkpoint.tensors[group.parts["difference"]].numel > 0


KIND = AdapterKind(name="full difference", endings={"diff": "difference"}, claims=_claims, build=_build, precedence=-1)
