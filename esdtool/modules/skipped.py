"""Describe why a tensor is left out: its kind, on which decisions rest, and its reason in words, for people."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class SkipKind(StrEnum):
    """The kind of a tensor that is left out."""

    VECTOR = "vector"
    """A norm's scale or a bias, with one dimension."""
    NO_MATRIX = "no-matrix"
    """A scalar, an empty tensor, a vector stored with more dimensions, or filters without a matrix between them."""
    TOKEN_EMBEDDING = "token-embedding"
    """The table of token vectors."""
    EMBEDDING = "embedding"
    """Any other embedding: positions, token types, patches, learned tokens."""
    OUTPUT_HEAD = "output-head"
    """The last matrix, which makes the model's output."""
    ROUTER = "router"
    """The matrix that chooses experts."""
    QUANTIZATION = "quantization"
    """Codes, scales or zero points of quantised weights."""
    ADAPTER = "adapter"
    """A factor of an adapter without its counterpart."""
    REPARAMETRIZATION = "reparametrization"
    """A part from which the model computes its weight."""
    BUFFER = "buffer"
    """A mask, an index, rotary frequencies or running statistics."""
    TABLE = "table"
    """Parameters that the model does not multiply a vector by: decay rates, codebooks, filter banks."""
    COPY = "copy"
    """A copy of weights that are there as well, such as their moving average, or an optimizer's state for them."""
    SEVERAL_MATRICES = "several-matrices"
    """Several weight matrices in one tensor, and nothing tells where one ends and the next begins."""
    UNKNOWN_LAYOUT = "unknown-layout"
    """Three dimensions or more, and nothing tells which of them make a matrix."""
    NOT_CHOSEN = "not-chosen"
    """The user's `include` or `exclude` leaves it out."""
    NO_COUNTERPART = "no-counterpart"
    """A module that only one of two compared checkpoints has."""
    OTHER = "other"
    """None of these; also what an analysis that was written before kinds were says."""


@dataclass(frozen=True, kw_only=True)
class SkipReason:
    """A kind of left-out tensor, and the words for the user."""

    kind: SkipKind
    words: str
    """For example `token embedding` or `1-D (norm or bias)`."""


@dataclass(frozen=True, kw_only=True)
class SkippedTensor:
    """A tensor that is left out, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: SkipKind
    reason: str
    """The reason in words."""
    parameter: str | None = None
    """The tensor that this is a part of; None: it is a whole tensor."""
