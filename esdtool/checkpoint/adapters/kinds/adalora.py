"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): dW = s B diag(E) A, with zeros in E where a rank was pruned.

As PEFT computes it, s = alpha / (rank + 1e-5), where a rank of zero or less as alpha means 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esdtool.checkpoint.adapters.base import AdapterKind, Context, FactoredUpdate, Group, UnfitError, Update, shown
from esdtool.checkpoint.adapters.kinds.lora import check_factors
from esdtool.checkpoint.base import Checkpoint


@dataclass(frozen=True, kw_only=True)
class _AdaLoraUpdate(FactoredUpdate):
    """One module's s B diag(E) A."""

    left: str
    right: str
    singular: str
    """Name of E [rank, 1]."""
    scale: float

    def pair(self, source: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the factors of the ranks that were kept, B times s E."""
        left, right = source.read(self.left).double(), source.read(self.right).double()
        values = source.read(self.singular).double().flatten()
        kept = values.nonzero().flatten()
        return left[:, kept] * values[kept] * self.scale, right[kept]


def _build(group: Group, context: Context) -> Update:
    check_factors(group, context)
    left, right, singular = (context.shape(group.parts[part]) for part in ("left", "right", "singular"))
    if len(left) != 2 or len(right) != 2 or left[1] != right[0] or singular not in ((left[1],), (left[1], 1)):
        raise UnfitError(
            ", ".join(shown(group.parts[part], context.shape(group.parts[part])) for part in group.parts)
            + " do not fit each other"
        )
    # A pruned rank adds an eigenvalue that is 0 by construction; E is a few bytes.
    rank = int(context.checkpoint.read(group.parts["singular"]).count_nonzero())
    transposed = bool(context.config.fan_in_fan_out)
    shape = (left[0], right[1])
    return _AdaLoraUpdate(
        info=context.info(group, shape[::-1] if transposed else shape, rank=max(rank, 1)),
        stored=tuple(group.parts.values()),
        target=f"{group.module}.weight",
        left=group.parts["left"],
        right=group.parts["right"],
        singular=group.parts["singular"],
        scale=_scale(group, context, left[1]),
        transposed=transposed,
    )


def _scale(group: Group, context: Context, rank: int) -> float:
    alpha = context.config.lora_alpha
    if alpha is None:
        context.guessed.add(group.module)
        return 1.0
    return (alpha if alpha > 0 else rank) / (rank + 1e-5)


def _claims(group: Group, context: Context) -> bool:  # noqa: ARG001
    return {"left", "right", "singular"} <= group.parts.keys()


KIND = AdapterKind(
    name="AdaLoRA", endings={"lora_E": "singular", "ranknum": "ranknum"}, claims=_claims, build=_build, precedence=2
)
