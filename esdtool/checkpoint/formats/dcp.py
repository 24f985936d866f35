"""A folder that torch.distributed.checkpoint (DCP) wrote: `.metadata` and the ranks' `.distcp` files.

Tensors are read one at a time, whatever number of files each is spread over, and without a process group. Each part
of a tensor is a file of `torch.save` within its rank's file.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.formats.dcp_metadata import StoredPart, StoredTensor, read_metadata
from esdtool.checkpoint.layout import DCP_METADATA
from esdtool.checkpoint.state_dict import ModelTensors, model_tensors
from esdtool.errors import CheckpointError
from esdtool.support.words import listed, one_line


@dataclass(kw_only=True)
class DistributedCheckpoint(Checkpoint):
    """The model's tensors in a DCP folder."""

    folder: Path
    entries: Mapping[str, StoredTensor] = field(repr=False)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, joined from all the files that hold a part of it."""
        self.info(name)
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for part in entry.parts:
            place = tuple(slice(offset, offset + size) for offset, size in zip(part.offsets, part.sizes, strict=True))
            tensor[place] = self._read_part(name, part, tensor.dtype)
        return tensor

    def _read_part(self, name: str, part: StoredPart, dtype: torch.dtype) -> torch.Tensor:
        try:
            with (self.folder / part.file).open("rb") as file:
                file.seek(part.start)
                value = torch.load(io.BytesIO(file.read(part.length)), map_location="cpu", weights_only=True)
            if not isinstance(value, torch.Tensor) or value.shape != part.sizes or value.dtype != dtype:
                raise ValueError("damaged: not the part that .metadata describes")
        # The parts are pickles of their own (read with weights_only) and can be damaged in any way.
        except Exception as error:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} in {part.file}: cannot read: {one_line(error)}"
            ) from error
        return value


def open_distributed(
    folder: Path, *, location: str, config: Mapping[str, Any], notes: tuple[str, ...] = ()
) -> DistributedCheckpoint:
    """Open a DCP folder from its `.metadata`.

    Raises:
        CheckpointError: if the metadata is unsafe or damaged, or a file or a part of a tensor is missing.
    """
    path = folder / DCP_METADATA
    found: ModelTensors[StoredTensor] = model_tensors(
        read_metadata(path), lambda value: isinstance(value, StoredTensor), file=location
    )
    used = sorted({file for entry in found.tensors.values() for file in entry.files})
    missing = [file for file in used if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(used)} files are not in the folder: {listed(missing)}; "
            "copy the checkpoint again, with every rank's files"
        )
    sizes = {file: (folder / file).stat().st_size for file in used}
    for name, entry in found.tensors.items():
        for part in entry.parts:
            if part.start + part.length > sizes[part.file]:
                raise CheckpointError(
                    f"{folder / part.file}: truncated: tensor {name!r} ends at byte {part.start + part.length} but the "
                    f"file has {sizes[part.file]}; copy the checkpoint again"
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
    )
