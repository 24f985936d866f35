"""A folder that torch.distributed.checkpoint (DCP) wrote: `.metadata` and the ranks' `.distcp` files.

Tensors are read one at a time, whatever number of files each is spread over, and without a process group. Each part
of a tensor is a file of `torch.save` within its rank's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.boundary import one_line_errors
from esdtool.checkpoint.dcp.metadata import StoredPart, StoredTensor, read_metadata
from esdtool.checkpoint.formats.torch_save.file import read_single
from esdtool.checkpoint.layout import DCP_METADATA
from esdtool.checkpoint.limits import check_names
from esdtool.checkpoint.state_dict import ModelTensors, model_tensors
from esdtool.checkpoint.stored_file import Place, StoredFile, exists
from esdtool.errors import CheckpointError
from esdtool.support.words import listed


@dataclass(kw_only=True)
class DistributedCheckpoint(Checkpoint):
    """The model's tensors in a DCP folder."""

    entries: Mapping[str, StoredTensor] = field(repr=False)
    parts: Mapping[str, StoredFile] = field(repr=False)
    """The ranks' files by name."""

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, joined from all the files that hold a part of it."""
        return self.read_rows(name, 0, self.info(name).shape[0] if self.info(name).shape else 1)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read positions `start` to `stop` of the first dimension, from the parts that hold some of them."""
        entry, dtype = self.entries[name], getattr(torch, self.info(name).dtype)
        first, last, _ = slice(start, stop).indices(entry.shape[0] if entry.shape else 1)
        tensor = torch.empty((max(first, last) - first, *entry.shape[1:]) if entry.shape else (), dtype=dtype)
        for part in entry.parts:
            if not entry.shape:
                tensor.copy_(self._read_part(name, part, dtype))
                continue
            begin, end = max(first, part.offsets[0]), min(last, part.offsets[0] + part.sizes[0])
            if begin < end:
                rest = (slice(at, at + size) for at, size in zip(part.offsets[1:], part.sizes[1:], strict=True))
                rows = slice(begin - part.offsets[0], end - part.offsets[0])
                tensor[slice(begin - first, end - first), *rest] = self._read_part(name, part, dtype)[rows]
        return tensor

    def _read_part(self, name: str, part: StoredPart, dtype: torch.dtype) -> torch.Tensor:
        file = self.parts[part.file]
        try:
            with one_line_errors(file.path):
                value = read_single(file.part(part.start, part.length), str(file.path))
        except CheckpointError as error:
            why = str(error).removeprefix(f"{file.path}: ").removeprefix("cannot read: ")
            raise self._unreadable(name, part, why) from error
        if value.shape != part.sizes or value.dtype != dtype:
            raise self._unreadable(name, part, f"damaged: not the part that {DCP_METADATA} describes")
        return value

    def _unreadable(self, name: str, part: StoredPart, why: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: tensor {name!r} in {part.file}: cannot read: {why}")


def open_distributed(
    folder: Place, *, location: str, config: Mapping[str, Any], notes: tuple[str, ...] = ()
) -> DistributedCheckpoint:
    """Open a DCP folder from its `.metadata`.

    Raises:
        CheckpointError: if the metadata is unsafe or damaged, or a file or a part of a tensor is missing.
    """
    path = folder / DCP_METADATA
    with one_line_errors(path, kind="the metadata of torch.distributed.checkpoint"):
        tree = read_metadata(path)
    found: ModelTensors[StoredTensor] = model_tensors(
        tree, lambda value: isinstance(value, StoredTensor), file=location
    )
    used = sorted({file for entry in found.tensors.values() for file in entry.files})
    missing = [file for file in used if not exists(folder / file)]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(used)} files are not in the folder: {listed(missing)}; "
            "copy the checkpoint again, with every rank's files"
        )
    check_names(str(path), found.tensors)
    parts = {file: StoredFile.at(folder / file) for file in used}
    for name, entry in found.tensors.items():
        for part in entry.parts:
            if part.start + part.length > parts[part.file].size:
                raise CheckpointError(
                    f"{folder / part.file}: truncated: tensor {name!r} ends at byte {part.start + part.length} but the "
                    f"file has {parts[part.file].size}; copy the checkpoint again"
                )
    return DistributedCheckpoint(
        location=location,
        tensors={
            name: TensorInfo(name=name, shape=entry.shape, dtype=entry.dtype, file=", ".join(entry.files))
            for name, entry in found.tensors.items()
        },
        files=tuple(used),
        config=config,
        notes=(*notes, *found.notes),
        folder=folder,
        entries=found.tensors,
        parts=parts,
    )
