"""A folder that torch.distributed.checkpoint (DCP) wrote: `.metadata` and the ranks' `.distcp` files.

Tensors are read one at a time through torch's own reader and planner, whatever number
of files each is spread over, and without a process group.
"""

from __future__ import annotations

import math
import pathlib
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.heads import read_head
from esdtool.checkpoint.jsonfiles import leaves_folder
from esdtool.checkpoint.layout import DCP_METADATA
from esdtool.checkpoint.state_dict import ModelTensors, model_tensors
from esdtool.errors import CheckpointError
from esdtool.support.words import listed, one_line

_METADATA_CLASSES = (
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
_FILE_CLASSES = ("_StorageInfo", "_StoragePrefix")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A tensor of the folder's catalogue."""

    key: str
    """Its key in `.metadata`."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    saved: int
    """Elements in all the parts that were saved."""


@dataclass(kw_only=True)
class DistributedCheckpoint(Checkpoint):
    """The model's tensors in a DCP folder."""

    folder: Path
    entries: Mapping[str, _Entry] = field(repr=False)
    metadata: Metadata = field(repr=False)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, joined from all the files that hold a part of it."""
        self.info(name)
        entry = self.entries[name]
        # `dcp.load` would do the same, but warns each time that there is no process group.
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        reader = FileSystemReader(self.folder)
        try:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            planner.set_up_planner({entry.key: tensor}, self.metadata, is_coordinator=True)
            reader.set_up_storage_reader(self.metadata, is_coordinator=True)
            plan = reader.prepare_local_plan(planner.create_local_plan())
            reader.read_data(planner.finish_plan(plan), planner).wait()
        # The parts are pickles of their own (read with weights_only) and can be damaged in any way.
        except Exception as error:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} in {self.tensors[name].file}: cannot read: {one_line(error)}"
            ) from error
        return tensor


def open_distributed(
    folder: Path, *, location: str, config: Mapping[str, Any], notes: tuple[str, ...] = ()
) -> DistributedCheckpoint:
    """Open a DCP folder from its `.metadata`.

    Raises:
        CheckpointError: if the metadata is unsafe or damaged, or a file or a part of a tensor is missing.
    """
    path = folder / DCP_METADATA
    metadata, tree, files = _read_metadata(path)
    found: ModelTensors[_Entry] = model_tensors(tree, lambda value: isinstance(value, _Entry), file=location)
    for name, entry in found.tensors.items():
        # torch would leave the rest of such a tensor uninitialised.
        if entry.saved < math.prod(entry.shape):
            raise CheckpointError(
                f"{path}: tensor {name!r}: only {entry.saved} of {math.prod(entry.shape)} elements were saved; "
                "the checkpoint is incomplete"
            )
    tensors = {
        name: TensorInfo(
            name=name,
            shape=entry.shape,
            dtype=str(entry.dtype).removeprefix("torch."),
            file=", ".join(sorted(files.get(entry.key, ()))),
        )
        for name, entry in found.tensors.items()
    }
    used = sorted({file for entry in found.tensors.values() for file in files.get(entry.key, ())})
    missing = [file for file in used if not (folder / file).exists()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(used)} files are not in the folder: {listed(missing)}; "
            "copy the checkpoint again, with every rank's files"
        )
    return DistributedCheckpoint(
        location=location,
        tensors=tensors,
        files=tuple(used),
        config=config,
        notes=(*notes, *found.notes),
        folder=folder,
        entries=found.tensors,
        metadata=metadata,
    )


class _Unpickler(pickle.Unpickler):
    """Builds DCP's own records and nothing else: torch reads `.metadata` with an unguarded pickle."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch.distributed.checkpoint.metadata" and name in _METADATA_CLASSES:
            return getattr(dcp_metadata, name)
        if module == "torch.distributed.checkpoint.filesystem" and name in _FILE_CLASSES:
            return getattr(dcp_filesystem, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return lambda layout: getattr(torch, str(layout).removeprefix("torch."))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"):
            # A path of the other platform cannot be built, and none is needed.
            return getattr(pathlib, f"Pure{name}")
        raise CheckpointError(f"{self.path}: refused: its pickle calls code ({module}.{name}), which is never run")


def _read_metadata(path: Path) -> tuple[Metadata, dict[str, Any], dict[str, set[str]]]:
    """(`.metadata`, the tree of its entries, the data files of each key)."""
    read_head(path)
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file, path).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path}: not the metadata of torch.distributed.checkpoint")
        return metadata, _tree(metadata), _files_by_key(metadata, path)
    except CheckpointError:
        raise
    # The parser meets arbitrary bytes here and fails in as many ways.
    except Exception as error:
        raise CheckpointError(
            f"{path}: not the metadata of torch.distributed.checkpoint, or damaged: {one_line(error)}"
        ) from error


def _tree(metadata: Metadata) -> dict[str, Any]:
    """The saved state dict's structure, with an `_Entry` for each tensor and None for anything else."""
    root: dict[str, Any] = {}
    paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    for key, stored in metadata.state_dict_metadata.items():
        entry = None
        if isinstance(stored, TensorStorageMetadata):
            entry = _Entry(
                key=key,
                shape=tuple(stored.size),
                dtype=stored.properties.dtype,
                saved=sum(math.prod(map(int, chunk.sizes)) for chunk in stored.chunks),
            )
        *above, last = (str(part) for part in paths.get(key, (key,)))
        node = root
        for part in above:
            node = node.setdefault(part, {})
        node[last] = entry
    return root


def _files_by_key(metadata: Metadata, path: Path) -> dict[str, set[str]]:
    """The data files of each key.

    Raises:
        CheckpointError: if one lies outside the folder.
    """
    files: dict[str, set[str]] = {}
    for index, stored in metadata.storage_data.items():
        if leaves_folder(stored.relative_path):
            raise CheckpointError(
                f"{path}: tensor {index.fqn!r}: refused: file {stored.relative_path!r} lies outside the "
                "checkpoint's folder"
            )
        files.setdefault(index.fqn, set()).add(stored.relative_path)
    return files
