"""Packing: documents of any length to rows of at most one sequence length, and rows to tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Ids: TypeAlias = npt.NDArray[Any]
"""Token ids, one dimension."""
MicroBatch: TypeAlias = dict[str, torch.Tensor]
"""`input_ids`, `labels` (int64 [micro_size, sequence_length]; label -100: no target) and, with the packing
`document`, `attention_mask` (int64). transformers shifts the labels itself: position t is the target of t - 1."""
PackingName = Literal["document", "dense"]

NO_TARGET = -100
"""The label that torch's cross entropy leaves out."""


def document_row(document: Ids, length: int) -> Ids:
    """Return the paper's packing: one document, cut to `length` tokens, of which the last one stays end-of-text.

    >>> document_row(np.array([5, 6, 7, 8, 0]), 4)
    array([5, 6, 7, 0])
    """
    if len(document) <= length:
        return document
    return np.concatenate([document[: length - 1], document[-1:]])


def pack(documents: Iterable[Ids], packing: PackingName, length: int) -> Iterator[Ids]:
    """Yield the rows of at most `length` tokens, in the order of the documents; none is left out.

    `document`: one row a document. `dense`: all documents joined and cut; only the last row may be shorter.

    >>> [row.tolist() for row in pack([np.array([5, 0]), np.array([6, 7, 0])], "dense", 3)]
    [[5, 0, 6], [7, 0]]
    """
    if packing == "document":
        yield from (document_row(document, length) for document in documents)
        return
    waiting: list[Ids] = []
    held = 0
    for document in documents:
        waiting.append(document)
        held += len(document)
        if held >= length:
            joined = np.concatenate(waiting)
            whole = held - held % length
            yield from joined[:whole].reshape(-1, length)
            waiting, held = [joined[whole:]], held - whole
    if held:
        yield np.concatenate(waiting)


def to_micro_batch(rows: Sequence[Ids], *, packing: PackingName, length: int, pad: int) -> MicroBatch:
    """Return the rows as the tensors that a transformers model takes, filled up on the right.

    With dense packing there is no attention mask: what is to the right of a token never
    reaches it in a causal model, and without a mask the fast attention kernels apply.
    """
    sizes = torch.tensor([len(row) for row in rows])
    input_ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.from_numpy(row.astype(np.int64))
    real = torch.arange(length) < sizes[:, None]
    batch = {"input_ids": input_ids, "labels": input_ids.masked_fill(~real, NO_TARGET)}
    if packing == "document":
        batch["attention_mask"] = real.to(torch.int64)
    return batch


def to_micro_batches(
    rows: Sequence[Ids], *, micro_size: int, packing: PackingName, length: int, pad: int
) -> list[MicroBatch]:
    """Consecutive rows, `micro_size` at a time."""
    parts = [rows[start : start + micro_size] for start in range(0, len(rows), micro_size)]
    return [to_micro_batch(part, packing=packing, length=length, pad=pad) for part in parts]


def count_targets(batch: MicroBatch) -> int:
    """Return the number of tokens that the loss of this batch sums over: labels[:, 1:] that are not -100."""
    return int((batch["labels"][:, 1:] != NO_TARGET).sum())


def targets_of(row: Ids) -> int:
    """Return the number of targets in a row: every token but the first."""
    return max(0, len(row) - 1)
