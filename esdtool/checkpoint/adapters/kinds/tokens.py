"""PEFT's trainable tokens: new rows of an embedding in the place of the base's (`trainable_token_indices`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from esdtool.checkpoint.adapters.base import AdapterKind, Context, Group, UnfitError, Update, shown
from esdtool.checkpoint.base import Checkpoint

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True, kw_only=True)
class _Rows(Update):
    """Rows of an embedding. Alone they are no matrix of weights; merged they stand in the embedding."""

    rows: str
    tokens: tuple[int, ...] | None
    """Which rows; None if the configuration does not say."""

    def delta(self, source: Checkpoint) -> torch.Tensor:
        """Read the rows."""
        return source.read(self.rows).double()

    def merged(self, weight: torch.Tensor, source: Checkpoint) -> torch.Tensor:
        """Put the rows in their places."""
        assert self.tokens is not None
        rows = source.read(self.rows).to(weight.dtype)
        return weight.index_copy(0, torch.tensor(self.tokens, dtype=torch.long), rows)

    def fitted(self, shape: tuple[int, ...]) -> Self | None:
        """Return the rows for an embedding [vocabulary, width]."""
        if self.tokens is None or len(shape) != 2 or shape[1] != self.info.shape[1] or max(self.tokens) >= shape[0]:
            return None
        return self


def _build(group: Group, context: Context) -> Update:
    rows = group.parts["rows"]
    shape = context.shape(rows)
    if len(shape) != 2 or 0 in shape:
        raise UnfitError(f"{shown(rows, shape)} is no row of an embedding")
    tokens = _tokens(group, context)
    if tokens is not None and (len(tokens) != shape[0] or min(tokens) < 0 or len(set(tokens)) != len(tokens)):
        raise UnfitError(f"{shown(rows, shape)} does not fit the {len(tokens)} token indices of the configuration")
    info = context.info(group, shape, rank=None)
    return _Rows(
        info=replace(info, name=f"{group.module}.trainable_tokens_delta"),
        stored=tuple(group.parts.values()),
        target=f"{group.module}.weight",
        rows=rows,
        tokens=tokens,
    )


def _tokens(group: Group, context: Context) -> tuple[int, ...] | None:
    config = context.config
    listed = config.token_indices if config.trainable_token_indices is None else config.trainable_token_indices
    if isinstance(listed, dict):
        leaf = group.module.rpartition(".")[2]
        listed = next((tokens for name, tokens in listed.items() if name in (leaf, group.module)), None)
    return None if not listed else tuple(listed)


def _claims(group: Group, context: Context) -> bool:  # noqa: ARG001
    return "rows" in group.parts


KIND = AdapterKind(
    name="trainable tokens",
    endings={"trainable_tokens_delta": "rows", "trainable_tokens_original": "original"},
    claims=_claims,
    build=_build,
)
