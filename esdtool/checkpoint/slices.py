"""Tensor-parallel slices: files that each hold a part of every matrix.

Meta's `consolidated.00.pth` and its siblings are joined, for how LLaMA is cut is known. Those of Megatron and DeepSpeed
(`mp_rank_00`, ...) are cut as their model parallelism was written, so they are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from esdtool.checkpoint.base import TensorInfo
from esdtool.checkpoint.container import WeightFile
from esdtool.checkpoint.stored_file import Place
from esdtool.errors import CheckpointError
from esdtool.support.words import listed

if TYPE_CHECKING:
    import torch

CONSOLIDATED = re.compile(r"consolidated\.(?P<rank>\d\d)\.(?P<suffix>pth|pt|safetensors)")
"""Name of one of Meta's files."""
_RANK = re.compile(r"(?P<before>(?:.*_)?[mt]p_rank_)(?P<rank>\d+)(?P<after>.*)")

_BY_ROWS = frozenset({"wq", "wk", "wv", "w1", "w3", "output"})
_BY_COLUMNS = frozenset({"wo", "w2"})
_EMBEDDING = "tok_embeddings"


class JoinedSlices(WeightFile):
    """The slices of one model as one file."""

    def __init__(self, path: Place, slices: Sequence[WeightFile]) -> None:
        """Look at the slices of all ranks, in order; `path` is one of them, for messages.

        Raises:
            CheckpointError: if they do not hold the same tensors, of shapes that fit.
        """
        self._slices = slices
        first = slices[0].tensors
        for number, other in enumerate(slices):
            if other.tensors.keys() != first.keys():
                raise CheckpointError(f"{path}: slices 0 and {number} do not hold the same tensors: not of one model")
        self._axes: dict[str, int | None] = {}
        tensors: dict[str, TensorInfo] = {}
        lost: list[str] = []
        width = _width(first)
        for name, info in first.items():
            parts = [other.tensors[name] for other in slices]
            axis = _axis(name, info, len(slices), width)
            if len(info.shape) > 1 and axis is None:
                lost.append(name)
                continue
            if not _fits(parts, axis):
                raise CheckpointError(f"{path}: tensor {name!r}: its slices do not fit each other: not of one model")
            shape = list(info.shape)
            if axis is not None:
                shape[axis] = sum(part.shape[axis] for part in parts)
            self._axes[name] = axis
            tensors[name] = replace(info, shape=tuple(shape))
        self.tensors = tensors
        notes = [*slices[0].notes, f"{path}: joined from {len(slices)} tensor-parallel slices"]
        if lost:
            notes.append(f"{path}: left out {len(lost)} tensors of which it is not known how they are cut: {lost[0]}")
        self.notes = tuple(notes)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read one tensor from all slices, or some positions of its first dimension."""
        import torch

        axis = self._axes[name]
        if axis is None:
            return self._slices[0].read(name, rows)
        if axis > 0:
            return torch.cat([part.read(name, rows) for part in self._slices], dim=axis)
        start, stop, _ = (rows or slice(None)).indices(self.tensors[name].shape[0])
        pieces, begin = [], 0
        for part in self._slices:
            end = begin + part.tensors[name].shape[0]
            if begin < stop and start < end:
                pieces.append(part.read(name, slice(max(start, begin) - begin, min(stop, end) - begin)))
            begin = end
        return torch.cat(pieces) if pieces else self._slices[0].read(name, slice(0, 0))


def siblings(path: Place) -> list[Place]:
    """List the files of all ranks of one of Meta's slices, in order; the file alone if it is none.

    Raises:
        CheckpointError: if a rank is missing.
    """
    own = CONSOLIDATED.fullmatch(path.name)
    if own is None:
        return [path]
    ranks = {int(own["rank"]): path}
    for other in _listed(path.absolute().parent):
        found = CONSOLIDATED.fullmatch(other.name)
        if found is not None and found["suffix"] == own["suffix"]:
            ranks.setdefault(int(found["rank"]), other)
    missing = sorted(set(range(max(ranks) + 1)) - ranks.keys())
    if missing:
        names = [f"consolidated.{rank:02d}.{own['suffix']}" for rank in missing]
        raise CheckpointError(f"{path}: a tensor-parallel slice; copy the others beside it: {listed(names, 3)}")
    return [ranks[rank] for rank in sorted(ranks)]


def refuse_lone_slice(path: Place, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse one of Meta's files that is only a part of its model, though no other lies beside it.

    Raises:
        CheckpointError: if its queries have fewer outputs than inputs by a whole factor, and its outputs fewer inputs.
    """
    if CONSOLIDATED.fullmatch(path.name) is None:
        return
    width = _width(tensors)
    for name, info in tensors.items():
        if name.endswith(".wo.weight") and len(info.shape) == 2 and width and info.shape == (width, info.shape[1]):
            parts, rest = divmod(width, info.shape[1])
            if parts > 1 and rest == 0 and tensors.get(name.replace(".wo.", ".wq."), info).shape[0] == info.shape[1]:
                raise CheckpointError(
                    f"{path}: one of {parts} tensor-parallel slices: it holds a part of every matrix; "
                    "copy the others (consolidated.01.pth, ...) beside it"
                )


def refuse_rank(path: Place) -> None:
    """Refuse a rank's file, or a file in a rank's folder, of Megatron's or DeepSpeed's tensor parallelism.

    Raises:
        CheckpointError: if there are other ranks beside it, or it is not the first.
    """
    for place in (path, path.absolute().parent):
        own = _RANK.fullmatch(place.name)
        if own is None:
            continue
        others = {
            other.name
            for other in _listed(place.absolute().parent)
            if (found := _RANK.fullmatch(other.name)) is not None
            and (found["before"], found["after"]) == (own["before"], own["after"])
        }
        if int(own["rank"]) or len(others) > 1:
            raise CheckpointError(
                f"{path}: one of {max(len(others), int(own['rank']) + 1)} tensor-parallel slices: it holds a part of "
                "every matrix; join them with the converter of the library that wrote them (Megatron's "
                "tools/checkpoint/convert.py, DeepSpeed's ds_to_universal.py) and analyse the result"
            )


def _listed(folder: Place) -> list[Place]:
    """Return the entries of a folder; none if it cannot be listed."""
    try:
        return [*folder.iterdir()]
    except OSError:
        return []


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _width(tensors: Mapping[str, TensorInfo]) -> int | None:
    """Return the model's width: that of its normalisations, or the inputs of its queries."""
    for name, info in tensors.items():
        if _leaf(name).endswith("norm") and len(info.shape) == 1:
            return info.shape[0]
    return next((info.shape[1] for name, info in tensors.items() if _leaf(name) == "wq" and len(info.shape) == 2), None)


def _axis(name: str, info: TensorInfo, count: int, width: int | None) -> int | None:
    """The dimension along which a tensor is cut; None for one that each rank has whole, or whose cut is not known."""
    leaf = _leaf(name)
    if len(info.shape) != 2 or not name.endswith(".weight"):
        return None
    if leaf in _BY_ROWS:
        return 0
    if leaf in _BY_COLUMNS:
        return 1
    if leaf == _EMBEDDING and width is not None:
        # LLaMA 3 cuts the vocabulary, its predecessors the width.
        return 1 if info.shape[1] * count == width else 0 if info.shape[1] == width else None
    return None


def _fits(parts: Sequence[TensorInfo], axis: int | None) -> bool:
    shapes = {tuple(size for dim, size in enumerate(part.shape) if dim != axis) for part in parts}
    return len(shapes) == 1 and len({part.dtype for part in parts}) == 1
