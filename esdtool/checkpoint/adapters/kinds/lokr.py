"""LoKr (Yeh et al. 2023, arXiv 2309.14859; LyCORIS, PEFT): dW = s kron(W1, W2), each whole or a product of factors.

W2 of a kernel may have a third factor T [rank, rank, *kernel] (Tucker decomposition).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esdtool.checkpoint.adapters.base import AdapterKind, Context, FactoredUpdate, Group, UnfitError, Update, shown
from esdtool.checkpoint.adapters.kinds.loha import lycoris_scale
from esdtool.checkpoint.base import Checkpoint

_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@dataclass(frozen=True, kw_only=True)
class _LoKrUpdate(FactoredUpdate):
    """One module's Kronecker product."""

    first: tuple[str, ...]
    """Names of W1, or of its factors."""
    second: tuple[str, ...]
    """Names of W2, or of its factors, the third one last."""
    scale: float

    def pair(self, source: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """Return factors of the product: kron(P Q, R S) = kron(P, R) kron(Q, S)."""
        (p, q), (r, s) = _slim(source, self.first), _slim(source, self.second)
        return torch.kron(p, r) * self.scale, torch.kron(q, s)

    def delta(self, source: Checkpoint) -> torch.Tensor:
        """Multiply both sides out."""
        first = _whole([source.read(name).double() for name in self.first])
        second = _whole([source.read(name).double() for name in self.second])
        return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second) * self.scale


def _slim(source: Checkpoint, names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read two factors of a side; one that is stored whole is its own factor."""
    tensors = [source.read(name).double() for name in names]
    if len(tensors) == 2:
        return tensors[0], tensors[1]
    whole = tensors[0]
    rows, columns = whole.shape
    eye = torch.eye(min(rows, columns), dtype=whole.dtype)
    return (eye, whole) if rows <= columns else (whole, eye)


def _whole(tensors: list[torch.Tensor]) -> torch.Tensor:
    if len(tensors) == 1:
        return tensors[0]
    if len(tensors) == 2:
        return tensors[0] @ tensors[1]
    return torch.einsum("ij...,ip,jr->pr...", tensors[2], tensors[0], tensors[1])


def _build(group: Group, context: Context) -> Update:
    first, second = _names(group, "lokr_w1"), _names(group, "lokr_w2")
    if len(second) == 2 and "lokr_t2" in group.parts:
        second = (*second, group.parts["lokr_t2"])
    (rows, columns), low = _side(first, context)
    (out, inputs, *kernel), high = _side(second, context)
    shape = (rows * out, columns * inputs, *kernel)
    rank = low * high
    factored = [names for names in (first, second) if len(names) > 1]
    scale = 1.0
    if factored or context.scales.rank(group.module) is not None:  # both whole: LyCORIS has no rank to divide by
        of_rank = context.shape(factored[0][1])[0] if factored else 1
        scale = lycoris_scale(group, context, of_rank)
    return _LoKrUpdate(
        info=context.info(group, shape, rank=rank if not kernel and rank < min(shape) else None),
        stored=tuple(group.parts.values()),
        target=f"{group.module}.weight",
        first=first,
        second=second,
        scale=scale,
        magnitude=group.parts.get("magnitude"),
    )


def _names(group: Group, side: str) -> tuple[str, ...]:
    parts = group.parts
    return (parts[side],) if side in parts else (parts[f"{side}_a"], parts[f"{side}_b"])


def _side(names: tuple[str, ...], context: Context) -> tuple[tuple[int, ...], int]:
    """(shape of one side, its largest possible rank)."""
    shapes = [context.shape(name) for name in names]
    if any(len(shape) < 2 or 0 in shape for shape in shapes):
        raise UnfitError(f"{shown(names[0], shapes[0])} is no matrix")
    if len(shapes) == 1:
        return shapes[0], min(shapes[0][:2])
    a, b = shapes[:2]
    if len(a) != 2 or len(b) != 2:
        raise UnfitError(f"{shown(names[0], a)} and {shown(names[1], b)} are no matrices")
    if len(shapes) == 3:
        t = shapes[2]
        if t[:2] != (a[0], b[0]):
            raise UnfitError(f"{shown(names[2], t)} does not fit {shown(names[0], a)}")
        return (a[1], b[1], *t[2:]), a[0]
    if a[1] != b[0]:
        raise UnfitError(f"{shown(names[0], a)} and {shown(names[1], b)} cannot be multiplied")
    return (a[0], b[1]), a[1]


def _claims(group: Group, context: Context) -> bool:  # noqa: ARG001
    return all(
        side in group.parts or {f"{side}_a", f"{side}_b"} <= group.parts.keys() for side in ("lokr_w1", "lokr_w2")
    )


KIND = AdapterKind(name="LoKr", endings={part: part for part in _PARTS}, claims=_claims, build=_build)
