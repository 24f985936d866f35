"""KaSA (Wang et al. 2024, arXiv 2412.06071): dW = s B diag(d) A, on a base without its least singular values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esdtool.checkpoint.adapters.base import AdapterKind, Context, Group, UnfitError, Update, shown
from esdtool.checkpoint.adapters.kinds.lora import KIND as LORA
from esdtool.checkpoint.adapters.kinds.lora import LoraUpdate
from esdtool.checkpoint.base import Checkpoint


@dataclass(frozen=True, kw_only=True)
class _KasaUpdate(LoraUpdate):
    """One module's s B diag(d) A."""

    diagonal: str

    def pair(self, source: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the factors, B times the scale and the diagonal."""
        left, right = super().pair(source)
        return left * source.read(self.diagonal).double().flatten(), right

    def merged(self, weight: torch.Tensor, source: Checkpoint) -> torch.Tensor:
        """Take as many of the least singular values from the base weight as the update has, and add it."""
        rank = source.tensors[self.diagonal].numel
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        kept = max(s.shape[0] - rank, 0)
        return super().merged((u[:, :kept] * s[:kept]) @ v[:kept], source)


def _build(group: Group, context: Context) -> Update:
    update = LORA.build(group, context)
    assert isinstance(update, LoraUpdate)
    diagonal = group.parts["diagonal"]
    if context.checkpoint.tensors[diagonal].numel != update.info.rank:
        raise UnfitError(f"{shown(diagonal, context.shape(diagonal))} is no diagonal of rank {update.info.rank}")
    return _KasaUpdate(**vars(update), diagonal=diagonal)


def _claims(group: Group, context: Context) -> bool:  # noqa: ARG001
    return {"left", "right", "diagonal"} <= group.parts.keys()


KIND = AdapterKind(name="KaSA", endings={"lora_diag": "diagonal"}, claims=_claims, build=_build, precedence=1)
