"""LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS, PEFT): dW = s (A1 B1) * (A2 B2), element by element.

A kernel has a third factor T [rank, rank, *kernel] in each product (Tucker decomposition), with A [rank, out] then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from esdtool.checkpoint.adapters.base import AdapterKind, Context, FactoredUpdate, Group, UnfitError, Update, shown
from esdtool.checkpoint.base import Checkpoint

_ENDINGS = {
    "hada_w1_a": "hada_w1_a",
    "hada_w1_b": "hada_w1_b",
    "hada_w2_a": "hada_w2_a",
    "hada_w2_b": "hada_w2_b",
    "hada_t1": "hada_t1",
    "hada_t2": "hada_t2",
}
_MATRICES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True, kw_only=True)
class _LoHaUpdate(FactoredUpdate):
    """One module's product of two products."""

    matrices: tuple[str, str, str, str]
    """Names of A1, B1, A2, B2."""
    tensors: tuple[str, str] | None
    """Names of T1 and T2."""
    scale: float

    def pair(self, source: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """Return factors of rank r1 r2: row-wise products of A1 and A2, and column-wise ones of B1 and B2."""
        a1, b1, a2, b2 = (source.read(name).double() for name in self.matrices)
        left = torch.einsum("oi,oj->oij", a1, a2).flatten(1)
        return left * self.scale, torch.einsum("ic,jc->ijc", b1, b2).flatten(0, 1)

    def delta(self, source: Checkpoint) -> torch.Tensor:
        """Multiply the two products."""
        a1, b1, a2, b2 = (source.read(name).double() for name in self.matrices)
        if self.tensors is None:
            return (a1 @ b1) * (a2 @ b2) * self.scale
        t1, t2 = (source.read(name).double() for name in self.tensors)
        form = "ij...,jr,ip->pr..."
        return torch.einsum(form, t1, b1, a1) * torch.einsum(form, t2, b2, a2) * self.scale


def _build(group: Group, context: Context) -> Update:
    a1, b1, a2, b2 = (context.matrix(group.parts[part]) for part in _MATRICES)
    tensors = (group.parts["hada_t1"], group.parts["hada_t2"]) if "hada_t1" in group.parts else None
    if tensors is None:
        fits = a1[0] == a2[0] and b1[1] == b2[1] and a1[1] == b1[0] and a2[1] == b2[0]
        shape: tuple[int, ...] = (a1[0], b1[1])
    else:
        t1, t2 = (context.shape(name) for name in tensors)
        fits = t1[:2] == (a1[0], b1[0]) and t2[:2] == (a2[0], b2[0]) and t1[2:] == t2[2:]
        fits = fits and a1[1] == a2[1] and b1[1] == b2[1]
        shape = (a1[1], b1[1], *t1[2:])
    if not fits:
        listed = ", ".join(shown(name, context.shape(name)) for name in group.parts.values())
        raise UnfitError(f"{listed} do not fit each other")
    rank = a1[1] * a2[1]
    slim = tensors is None and rank < min(shape)
    first, second, third, fourth = (group.parts[part] for part in _MATRICES)
    return _LoHaUpdate(
        info=context.info(group, shape, rank=rank if slim else None),
        stored=tuple(group.parts.values()),
        target=f"{group.module}.weight",
        matrices=(first, second, third, fourth),
        tensors=tensors,
        scale=lycoris_scale(group, context, b1[0]),
        magnitude=group.parts.get("magnitude"),
    )


def lycoris_scale(group: Group, context: Context, rank: int) -> float:
    """Return alpha / rank: LyCORIS' from the file, PEFT's from the configuration, whose rank counts there."""
    configured = context.scales.rank(group.module)
    if "alpha" not in group.parts and configured is not None:
        alpha = context.scales.alpha(group.module, context.config.alpha)
        if alpha is not None and math.isfinite(alpha):
            return alpha / configured
    return context.scale(group, rank, context.config.alpha)


def _claims(group: Group, context: Context) -> bool:  # noqa: ARG001
    return set(_MATRICES) <= group.parts.keys() and ("hada_t1" in group.parts) == ("hada_t2" in group.parts)


KIND = AdapterKind(name="LoHa", endings=_ENDINGS, claims=_claims, build=_build)
