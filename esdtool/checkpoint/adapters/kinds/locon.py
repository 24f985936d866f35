"""LyCORIS' LoCon with a middle factor: dW[o, i, x, y] = s sum_jk B[o, j] M[j, k, x, y] A[k, i].

A [rank, in] and B [out, rank] are 1 x 1 kernels, M [rank, rank, *kernel] is the convolution between them (Tucker
decomposition).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esdtool.checkpoint.adapters.base import AdapterKind, Context, FactoredUpdate, Group, UnfitError, Update, shown
from esdtool.checkpoint.adapters.kinds.lora import rank_of
from esdtool.checkpoint.base import Checkpoint


@dataclass(frozen=True, kw_only=True)
class _LoConUpdate(FactoredUpdate):
    """One convolution's s B M A."""

    left: str
    middle: str
    right: str
    scale: float

    def pair(self, source: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the factors: B times the scale, and the product of the others."""
        left = source.read(self.left).double().flatten(1)
        right = source.read(self.right).double().flatten(1)
        middle = source.read(self.middle).double()
        return left * self.scale, torch.einsum("jk...,ki->ji...", middle, right)


def _build(group: Group, context: Context) -> Update:
    left, right = context.matrix(group.parts["left"]), context.matrix(group.parts["right"])
    middle = context.shape(group.parts["middle"])
    if len(middle) < 2 or left[1] != middle[0] or middle[1] != right[0]:
        raise UnfitError(f"{shown(group.parts['middle'], middle)} does not fit between {list(left)} and {list(right)}")
    rank = right[0]
    shape = (left[0], right[1], *middle[2:])
    return _LoConUpdate(
        info=context.info(group, shape, rank=rank_of(shape, min(middle[:2]))),
        stored=tuple(group.parts.values()),
        target=f"{group.module}.weight",
        left=group.parts["left"],
        middle=group.parts["middle"],
        right=group.parts["right"],
        scale=context.scale(group, rank, context.config.lora_alpha),
        magnitude=group.parts.get("magnitude"),
    )


def _claims(group: Group, context: Context) -> bool:  # noqa: ARG001
    return {"left", "right", "middle"} <= group.parts.keys()


KIND = AdapterKind(name="LoCon", endings={"lora_mid": "middle"}, claims=_claims, build=_build, precedence=1)
