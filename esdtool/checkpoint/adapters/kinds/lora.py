"""LoRA (Hu et al. 2021, arXiv 2106.09685): dW = s B A with A [rank, in] and B [out, rank], s = alpha / rank.

PEFT's names are understood, and those of kohya's scripts, diffusers and NeMo. So are PEFT's variants: rank-stabilised
LoRA (s = alpha / sqrt(rank)), DoRA, embeddings, convolutions, and the block-diagonal factors of BD-LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esdtool.checkpoint.adapters.base import AdapterKind, Context, FactoredUpdate, Group, UnfitError, Update, shown
from esdtool.checkpoint.base import Checkpoint

_ENDINGS = {
    "lora_A": "right",
    "lora_B": "left",
    "lora_embedding_A": "right",
    "lora_embedding_B": "left",
    "lora_down": "right",
    "lora_up": "left",
    "lora.down": "right",
    "lora.up": "left",
    "_lora.down": "right",
    "_lora.up": "left",
    "lora_linear_layer.down": "right",
    "lora_linear_layer.up": "left",
    "adapter.linear_in": "right",
    "adapter.linear_out": "left",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "magnitude",
    "alpha": "alpha",
}


@dataclass(frozen=True, kw_only=True)
class LoraUpdate(FactoredUpdate):
    """One module's s B A."""

    left: str
    """Name of B."""
    right: str
    """Name of A."""
    scale: float
    blocks: tuple[int, int] = (1, 1)
    """Blocks on the diagonals of B and A (BD-LoRA)."""

    def pair(self, source: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the factors, B times the scale."""
        left = _block_diagonal(source.read(self.left).double(), self.blocks[0])
        right = _block_diagonal(source.read(self.right).double(), self.blocks[1])
        if left.ndim > 2:
            left = left.flatten(1)  # a 1 x 1 kernel
        return left * self.scale, right


def _block_diagonal(factor: torch.Tensor, blocks: int) -> torch.Tensor:
    return factor if blocks == 1 else torch.block_diag(*factor.chunk(blocks, dim=0))


def _build(group: Group, context: Context) -> Update:
    config = context.config
    if config.use_qalora:
        raise UnfitError("QALoRA pools its inputs; merge it with PEFT and analyse the merged model")
    left, right = context.shape(group.parts["left"]), context.shape(group.parts["right"])
    check_factors(group, context)
    blocks = _blocks(group, context)
    left = (left[0], left[1] * blocks[0], *left[2:])
    right = (right[0], right[1] * blocks[1], *right[2:])
    if len(left) != len(right) or left[1] != right[0] or not set(left[2:]) <= {1}:
        raise UnfitError(f"{shown(group.parts['left'], left)} and {shown(group.parts['right'], right)} do not fit")
    rank, shape = left[1], (left[0], *right[1:])
    transposed = len(shape) == 2 and (group.embedding or bool(config.fan_in_fan_out))
    return LoraUpdate(
        info=context.info(group, shape[::-1] if transposed else shape, rank=rank_of(shape, rank)),
        stored=tuple(group.parts.values()),
        target=f"{group.module}.weight",
        left=group.parts["left"],
        right=group.parts["right"],
        scale=context.scale(group, rank, config.lora_alpha),
        transposed=transposed,
        magnitude=group.parts.get("magnitude"),
        blocks=blocks,
    )


def rank_of(shape: tuple[int, ...], rank: int) -> int | None:
    """Rank to note of an update [out, in, *kernel]; None for a kernel whose factors are not slim.

    >>> rank_of((64, 32), 40), rank_of((64, 32, 3), 40), rank_of((64, 32, 3), 4)
    (40, None, 4)
    """
    return rank if len(shape) == 2 or rank < min(shape[:2]) else None


def check_factors(group: Group, context: Context, left: str = "left", right: str = "right") -> None:
    """Refuse factors that are no matrices, or empty.

    Raises:
        UnfitError: if one is.
    """
    for part in (left, right):
        shape = context.shape(group.parts[part])
        if len(shape) < 2 or 0 in shape:
            what = "rank 0" if 0 in shape else "not a matrix"
            raise UnfitError(f"{shown(group.parts[part], shape)}: {what}; perhaps not gathered before it was saved")


def _blocks(group: Group, context: Context) -> tuple[int, int]:
    """Blocks of B and of A by the configuration of BD-LoRA, which names modules by any part of their paths."""
    settings = context.config.use_bdlora
    if settings is None:
        return 1, 1
    if any(part in group.module for part in settings.target_modules_bd_a or ()):
        return 1, settings.nblocks
    if any(part in group.module for part in settings.target_modules_bd_b or ()):
        return settings.nblocks, 1
    return 1, 1


def has_pair(group: Group, context: Context) -> bool:  # noqa: ARG001 - the signature of `AdapterKind.claims`
    """Return whether both factors are there."""
    return {"left", "right"} <= group.parts.keys()


KIND = AdapterKind(name="LoRA", endings=_ENDINGS, claims=has_pair, build=_build)
