"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): dW = diag(b) B diag(d) A, with random A and B that all modules share.

Each module uses the first columns of A [rank, largest in] and the first rows of B [largest out, rank], as many as its
weight has. A module's outputs are the entries of its b; its inputs are known for certain only where the file or the
base model tells.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from esdtool.checkpoint.adapters.base import AdapterKind, Context, FactoredUpdate, Group, UnfitError, Update, shown
from esdtool.checkpoint.base import Checkpoint

if TYPE_CHECKING:
    from typing import Self

_FROM_HIDDEN = frozenset(
    {
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
        "query",
        "key",
        "value",
        "query_key_value",
        "c_attn",
        "q",
        "v",
    }
)
"""Modules that all take the hidden state."""


@dataclass(frozen=True, kw_only=True)
class _VeraUpdate(FactoredUpdate):
    """One module's diag(b) B diag(d) A."""

    projections: tuple[str, str]
    """Names of A and B."""
    outputs: str
    """Name of b."""
    ranks: str
    """Name of d."""
    widest: int
    """Columns of A."""

    def pair(self, source: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the module's part of the projections, scaled."""
        b, d = source.read(self.outputs).double().flatten(), source.read(self.ranks).double().flatten()
        columns = self.info.shape[0] if self.transposed else self.info.shape[1]
        right = source.read(self.projections[0]).double()[:, :columns]
        left = source.read_rows(self.projections[1], 0, b.numel()).double()
        return b[:, None] * left, d[:, None] * right

    def fitted(self, shape: tuple[int, ...]) -> Self | None:
        """Return the update for a base weight of this shape, which tells the number of inputs."""
        if len(shape) != 2:
            return None
        mine = self.info.shape
        axis = 0 if self.transposed else 1
        if shape[1 - axis] != mine[1 - axis] or shape[axis] > self.widest:
            return None
        return replace(self, info=replace(self.info, shape=shape))


def _build(group: Group, context: Context) -> Update:
    if not {"vera_A", "vera_B"} <= context.shared.keys():
        raise UnfitError(
            f"{group.parts['outputs']}: the projections are not in the file; save the adapter with "
            "save_projection=True, or merge it with PEFT and analyse the merged model"
        )
    a, b = context.shared["vera_A"], context.shared["vera_B"]
    of_a, of_b = context.matrix(a), context.matrix(b)
    outputs = context.checkpoint.tensors[group.parts["outputs"]].numel
    ranks = context.checkpoint.tensors[group.parts["ranks"]].numel
    if of_a[0] != ranks or of_b[1] != ranks or outputs > of_b[0] or not outputs:
        raise UnfitError(f"{shown(a, of_a)} and {shown(b, of_b)} do not fit {outputs} outputs of rank {ranks}")
    transposed = bool(context.config.fan_in_fan_out)
    shape = (outputs, of_a[1])
    return _VeraUpdate(
        info=context.info(group, shape[::-1] if transposed else shape, rank=ranks),
        stored=tuple(group.parts.values()),
        target=f"{group.module}.weight",
        projections=(a, b),
        outputs=group.parts["outputs"],
        ranks=group.parts["ranks"],
        widest=of_a[1],
        transposed=transposed,
        needs_base=not _same_inputs(context),
    )


def _same_inputs(context: Context) -> bool:
    """Return whether all modules have equally many inputs, so that A has that many columns."""
    leaves = {other.module.rpartition(".")[2] for other in context.groups if "outputs" in other.parts}
    return len(leaves) == 1 or leaves <= _FROM_HIDDEN


def _claims(group: Group, context: Context) -> bool:  # noqa: ARG001
    return {"outputs", "ranks"} <= group.parts.keys()


KIND = AdapterKind(
    name="VeRA",
    endings={"vera_lambda_b": "outputs", "vera_lambda_d": "ranks", "vera_A": "vera_A", "vera_B": "vera_B"},
    claims=_claims,
    build=_build,
)
