"""Checkpoints on disk: one file, a Hugging Face folder, or shards joined by an index."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.jsonfiles import read_config, read_index
from esdtool.checkpoint.layout import (
    DCP_METADATA,
    GGUF_SUFFIX,
    INDEX_SUFFIX,
    KERAS_SUFFIXES,
    ONNX_SUFFIX,
    PICKLE_SUFFIXES,
    SAFETENSORS_SUFFIX,
    UNREAD_SUFFIXES,
    WEIGHT_SUFFIXES,
    WeightChoice,
    choose_weights,
    config_name,
    has_known_name,
    is_weight_file,
)
from esdtool.checkpoint.other_files import other_suffix
from esdtool.checkpoint.slices import JoinedSlices, refuse_lone_slice, refuse_rank, siblings
from esdtool.errors import CheckpointError
from esdtool.support.words import counted, listed

if TYPE_CHECKING:
    import torch


class WeightFile(Protocol):
    """One file with tensors.

    Formats that describe the model, too, have an attribute `config`: a mapping with the names of a `config.json`,
    which is used where there is no such file.
    """

    notes: tuple[str, ...]
    tensors: dict[str, TensorInfo]

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read one tensor, or some positions of its first dimension."""
        ...


@dataclass(kw_only=True)
class FileCheckpoint(Checkpoint):
    """Tensors that lie in one or more weight files."""

    sources: Mapping[str, WeightFile] = field(repr=False)
    """The file of each tensor."""

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor from its file."""
        self.info(name)
        return self.sources[name].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read a part of one tensor from its file."""
        self.info(name)
        return self.sources[name].read(name, slice(start, stop))


def open_file(path: Path) -> Checkpoint:
    """Open one weight file, an index, or the `.metadata` of a torch.distributed.checkpoint folder."""
    if path.name.endswith(INDEX_SUFFIX):
        choice = WeightChoice(kind="index", file=path.name, config=config_name(path.name))
        return open_choice(path.parent, choice, location=str(path))
    if path.name == DCP_METADATA:
        return open_choice(
            path.parent, WeightChoice(kind="dcp", file=path.name, config="config.json"), location=str(path)
        )
    source = _open_weights(path, path.name)
    config = read_config(path.parent / config_name(path.name)) if has_known_name(path.name) else {}
    return FileCheckpoint(
        location=str(path),
        tensors=source.tensors,
        files=_files_of(source.tensors, path.name),
        config=config or _own_config(source),
        notes=source.notes,
        folder=path.parent,
        sources=dict.fromkeys(source.tensors, source),
    )


def open_directory(folder: Path) -> Checkpoint:
    """Open the weights in a folder.

    Raises:
        CheckpointError: if it cannot be listed, or has no weights or several that do not belong together.
    """
    try:
        names = [entry.name for entry in folder.iterdir() if not entry.is_dir()]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot list: {error.strerror}") from error
    try:
        choice = choose_weights(names, location=str(folder))
    except CheckpointError as error:
        below = _subfolders_with_weights(folder)
        if below:
            raise CheckpointError(f"{error}; there are weights in its subfolders {', '.join(below)}") from error
        raise
    return open_choice(folder, choice, location=str(folder))


def open_choice(folder: Path, choice: WeightChoice, *, location: str, revision: str | None = None) -> Checkpoint:
    """Open what was chosen in a folder, e.g. in a snapshot of a Hub repository."""
    config: Mapping[str, Any] = read_config(folder / choice.config)
    if choice.kind == "dcp":
        from esdtool.checkpoint.formats.dcp import open_distributed

        return open_distributed(folder, location=location, config=config, notes=choice.notes(location))
    shards: Collection[str] = ()
    if choice.kind == "index":
        sources, tensors, notes = _open_shards(folder, folder / choice.file)
        shards = {tensor.file for tensor in tensors.values()}
    else:
        source = _open_weights(folder / choice.file, choice.file)
        sources, tensors, notes = dict.fromkeys(source.tensors, source), source.tensors, list(source.notes)
        config = config or _own_config(source)
    return FileCheckpoint(
        location=location,
        tensors=tensors,
        files=_files_of(tensors, choice.file),
        revision=revision,
        config=config,
        notes=(*choice.notes(location, shards), *notes),
        folder=folder,
        sources=sources,
    )


def _open_weights(path: Path, label: str) -> WeightFile:
    """Open one weight file by its suffix, with its siblings if they are slices of one model."""
    refuse_rank(path)
    ranks = siblings(path)
    if len(ranks) == 1:
        source = _open_one(path, label)
        refuse_lone_slice(path, source.tensors)
        return source
    folder = label[: len(label) - len(path.name)]
    return JoinedSlices(path, [_open_one(rank, folder + rank.name) for rank in ranks])


def _open_one(path: Path, label: str) -> WeightFile:
    name = path.name.lower()
    if name.endswith(SAFETENSORS_SUFFIX):
        from esdtool.checkpoint.formats.safetensors_file import SafetensorsFile

        return SafetensorsFile(path, label)
    if name.endswith(PICKLE_SUFFIXES):
        from esdtool.checkpoint.formats.export_file import ExportFile, is_export_archive
        from esdtool.checkpoint.formats.pickle_file import PickleFile

        if is_export_archive(path):
            return ExportFile(path, label)
        return PickleFile(path, label)
    if name.endswith(GGUF_SUFFIX):
        from esdtool.checkpoint.formats.gguf_file import GGUFFile

        return GGUFFile(path, label)
    if name.endswith(ONNX_SUFFIX):
        from esdtool.checkpoint.formats.onnx_file import ONNXFile

        return ONNXFile(path, label)
    if name.endswith(KERAS_SUFFIXES):
        from esdtool.checkpoint.formats.keras_file import KerasFile

        return KerasFile(path, label)
    known = f"known are {', '.join(WEIGHT_SUFFIXES)} and *{INDEX_SUFFIX}"
    if name.endswith(UNREAD_SUFFIXES):
        raise CheckpointError(f"{path}: {path.suffix.lower()} files are not read; {known}")
    other = other_suffix(path)
    if other is not None:
        raise CheckpointError(f"{path}: {other}")
    raise CheckpointError(f"{path}: unknown format {path.suffix!r}; {known}")


def _open_shards(folder: Path, index_path: Path) -> tuple[dict[str, WeightFile], dict[str, TensorInfo], list[str]]:
    """Open every shard of an index: (file of each tensor, catalogue, notes). Follows `weight_map`, no wildcard."""
    index = read_index(index_path)
    missing = [shard for shard in index.shards if not (folder / shard).exists()]
    if missing:
        raise CheckpointError(
            f"{index_path}: {counted(len(missing), 'shard')} of {len(index.shards)} not in the folder: "
            f"{listed(missing)}; download or copy the checkpoint again"
        )
    shards = {shard: _open_weights(folder / shard, shard) for shard in index.shards}
    for name, shard in index.weight_map.items():
        if name not in shards[shard].tensors:
            raise CheckpointError(
                f"{index_path}: tensor {name!r} should be in {shard}, but is not; index and shards do not fit together"
            )
    notes = [note for shard in shards.values() for note in shard.notes]
    extra = sorted({name for shard in shards.values() for name in shard.tensors} - set(index.weight_map))
    if extra:
        left_out = counted(len(extra), "tensor")
        notes.append(f"{index_path}: left out {left_out} that the index does not list: {listed(extra)}")
    sources = {name: shards[shard] for name, shard in index.weight_map.items()}
    return sources, {name: source.tensors[name] for name, source in sources.items()}, notes


def _own_config(source: WeightFile) -> Mapping[str, Any]:
    """What a file says of its model, for formats that do."""
    config: Mapping[str, Any] = getattr(source, "config", {})
    return config


def _files_of(tensors: Mapping[str, TensorInfo], opened: str) -> tuple[str, ...]:
    """The files that hold the tensors; the one that was opened if there are none."""
    return tuple(sorted({info.file for info in tensors.values()} or {opened}))


def _subfolders_with_weights(folder: Path) -> list[str]:
    """Names of direct subfolders that `open_directory` may take."""
    found = []
    for sub in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        try:
            names = [entry.name for entry in sub.iterdir()]
        except OSError:
            continue
        if any(is_weight_file(name) or name == DCP_METADATA for name in names):
            found.append(sub.name)
    return found
