"""LoRA under lower-case names: MLX has A [in, rank] and B [rank, out], torchtune A [rank, in] and B [out, rank]."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esdtool.checkpoint.adapters.base import AdapterKind, Context, Group, UnfitError, Update, shown
from esdtool.checkpoint.adapters.kinds.lora import LoraUpdate, check_factors
from esdtool.checkpoint.base import Checkpoint


@dataclass(frozen=True, kw_only=True)
class _Turned(LoraUpdate):
    """The update of MLX's factors, both of them stored transposed."""

    def pair(self, source: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the factors, B times the scale."""
        return source.read(self.left).double().mT * self.scale, source.read(self.right).double().mT


def _build(group: Group, context: Context) -> Update:
    check_factors(group, context, "b", "a")
    b, a = context.shape(group.parts["b"]), context.shape(group.parts["a"])
    upright = len(a) == len(b) == 2 and b[1] == a[0]
    turned = len(a) == len(b) and 2 <= len(a) <= 3 and b[:-2] == a[:-2] and a[-1] == b[-2]
    if upright and turned:  # square weights: of the two readings, the one of low rank
        turned = a[1] < a[0]
    if not upright and not turned:
        raise UnfitError(f"{shown(group.parts['a'], a)} and {shown(group.parts['b'], b)} do not fit")
    rank = a[-1] if turned else a[0]
    shape = (*b[:-2], b[-1], a[-2]) if turned else (b[0], a[1])
    mlx = context.config.lora_parameters
    return (_Turned if turned else LoraUpdate)(
        info=context.info(group, shape, rank=rank),
        stored=tuple(group.parts.values()),
        target=f"{group.module}.weight",
        left=group.parts["b"],
        right=group.parts["a"],
        scale=context.scale(group, rank, context.config.lora_alpha) if mlx is None else mlx.scale,
        magnitude=group.parts.get("m") or group.parts.get("magnitude"),
    )


def _claims(group: Group, context: Context) -> bool:  # noqa: ARG001
    return {"a", "b"} <= group.parts.keys()


KIND = AdapterKind(
    name="LoRA", endings={"lora_a": "a", "lora_b": "b", "m": "m", "magnitude": "m"}, claims=_claims, build=_build
)
