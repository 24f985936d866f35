"""LoRA in GGUF, as llama.cpp's `convert_lora_to_gguf.py` writes it: `NAME.weight.lora_a` and `NAME.weight.lora_b`.

A is [rank, in] and B [out, rank], with the experts in front where the weight has several; of the token embedding A is
[vocabulary, rank] and B [width, rank], and dW = A B^T. The scale is alpha / rank with the file's own alpha, or 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esdtool.checkpoint.adapters.base import AdapterKind, Context, Group, UnfitError, Update, shown
from esdtool.checkpoint.adapters.kinds.lora import LoraUpdate, check_factors
from esdtool.checkpoint.base import Checkpoint

_EMBEDDING = "token_embd"


@dataclass(frozen=True, kw_only=True)
class _Embedding(LoraUpdate):
    """The update of the token embedding, whose factors are flipped."""

    def pair(self, source: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the factors, the first times the scale."""
        return source.read(self.right).double() * self.scale, source.read(self.left).double().mT


@dataclass(frozen=True, kw_only=True)
class _Stack(LoraUpdate):
    """The updates of all experts of a layer."""

    def pair(self, source: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the factors, B times the scale."""
        return source.read(self.left).double() * self.scale, source.read(self.right).double()


def _build(group: Group, context: Context) -> Update:
    check_factors(group, context, "ggml_b", "ggml_a")
    b, a = context.shape(group.parts["ggml_b"]), context.shape(group.parts["ggml_a"])
    embedding = group.module.rpartition(".")[2] == _EMBEDDING
    fits = a[-1] == b[-1] if embedding else a[-2] == b[-1]
    if not fits or len(a) != len(b) or len(a) > 3 or a[:-2] != b[:-2]:
        raise UnfitError(f"{shown(group.parts['ggml_a'], a)} and {shown(group.parts['ggml_b'], b)} do not fit")
    rank = b[-1]
    return (_Embedding if embedding else _Stack)(
        info=context.info(group, (a[0], b[0]) if embedding else (*b[:-1], a[-1]), rank=rank),
        stored=tuple(group.parts.values()),
        target=f"{group.module}.weight",
        left=group.parts["ggml_b"],
        right=group.parts["ggml_a"],
        scale=context.scale(group, rank, context.config.lora_alpha),
    )


def _claims(group: Group, context: Context) -> bool:  # noqa: ARG001
    return {"ggml_a", "ggml_b"} <= group.parts.keys()


KIND = AdapterKind(
    name="LoRA", endings={"weight.lora_a": "ggml_a", "weight.lora_b": "ggml_b"}, claims=_claims, build=_build
)
