"""Checkpoints of files, on disk or in a remote store: one file, a Hugging Face folder, or shards joined by an index."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.boundary import one_line_errors
from esdtool.checkpoint.container import WeightFile
from esdtool.checkpoint.formats import container_of, weight_suffixes
from esdtool.checkpoint.jsonfiles import read_config, read_index
from esdtool.checkpoint.layout import (
    DCP_METADATA,
    INDEX_SUFFIX,
    WeightChoice,
    choose_weights,
    config_name,
    has_known_name,
    is_weight_file,
    unread_suffixes,
)
from esdtool.checkpoint.limits import check_names, check_shapes
from esdtool.checkpoint.other_files import other_suffix
from esdtool.checkpoint.remote.path import RemotePath, side_by_side
from esdtool.checkpoint.slices import JoinedSlices, refuse_lone_slice, refuse_rank, siblings
from esdtool.checkpoint.stored_file import Place, StoredFile, exists
from esdtool.errors import CheckpointError
from esdtool.support.words import counted, listed, visible

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class OpenedFile:
    """One weight file of a checkpoint."""

    path: Place
    content: WeightFile


@dataclass(kw_only=True)
class FileCheckpoint(Checkpoint):
    """Tensors that lie in one or more weight files."""

    sources: Mapping[str, OpenedFile] = field(repr=False)
    """The file of each tensor."""

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor from its file."""
        return self._read(name, None)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read a part of one tensor from its file."""
        return self._read(name, slice(start, stop))

    def stored_bytes(self, name: str) -> int:
        """Return the bytes that a tensor takes in its file."""
        self.info(name)
        return self.sources[name].content.stored_bytes(name)

    def fingerprint(self, name: str) -> str | None:
        """Return the identity of the tensor's own file, and the tensor's place there, where that is all it needs."""
        info = self.info(name)
        stretch = self.sources[name].content.stretch(name)
        if stretch is None:
            return super().fingerprint(name)
        identity = stretch.source.fingerprint
        return None if identity is None else repr((identity, stretch.start, stretch.size, info.shape, info.dtype))

    def _read(self, name: str, rows: slice | None) -> torch.Tensor:
        self.info(name)
        source = self.sources[name]
        with one_line_errors(source.path, tensor=name):
            return source.content.read(name, rows)


def open_file(path: Place) -> Checkpoint:
    """Open one weight file, an index, or the `.metadata` of a torch.distributed.checkpoint folder."""
    if path.name.endswith(INDEX_SUFFIX):
        choice = WeightChoice(kind="index", file=path.name, config=config_name(path.name))
        return open_choice(path.parent, choice, location=str(path))
    if path.name == DCP_METADATA:
        return open_choice(
            path.parent, WeightChoice(kind="dcp", file=path.name, config="config.json"), location=str(path)
        )
    source = open_weights(path, path.name)
    tensors = source.content.tensors
    config = read_config(path.parent / config_name(path.name)) if has_known_name(path.name) else {}
    return FileCheckpoint(
        location=str(path),
        tensors=tensors,
        files=_files_of(tensors, path.name),
        config=config or source.content.config,
        notes=source.content.notes,
        folder=path.parent,
        sources=dict.fromkeys(tensors, source),
    )


def open_directory(folder: Place) -> Checkpoint:
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


def open_choice(folder: Place, choice: WeightChoice, *, location: str, revision: str | None = None) -> Checkpoint:
    """Open what was chosen in a folder, e.g. in a snapshot of a Hub repository."""
    config: Mapping[str, Any] = read_config(folder / choice.config)
    if choice.kind == "dcp":
        from esdtool.checkpoint.dcp.folder import open_distributed

        return open_distributed(folder, location=location, config=config, notes=choice.notes(location))
    shards: Collection[str] = ()
    if choice.kind == "index":
        sources, tensors, notes = _open_shards(folder, folder / choice.file)
        shards = {tensor.file for tensor in tensors.values()}
    else:
        source = open_weights(folder / choice.file, choice.file)
        tensors, notes = dict(source.content.tensors), list(source.content.notes)
        sources = dict.fromkeys(tensors, source)
        config = config or source.content.config
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


def open_weights(path: Place, label: str) -> OpenedFile:
    """Open one weight file by its name, with its siblings if they are slices of one model.

    Args:
        path: the file.
        label: its name within the checkpoint.

    Raises:
        CheckpointError: if it is of no known container, is damaged, asks for more than a file may, or is a slice.
    """
    refuse_rank(path)
    ranks = siblings(path)
    if len(ranks) == 1:
        opened = _open_one(path, label)
        refuse_lone_slice(path, opened.content.tensors)
        return opened
    folder = label[: len(label) - len(path.name)]
    return OpenedFile(
        path=path, content=JoinedSlices(path, [_open_one(rank, folder + rank.name).content for rank in ranks])
    )


def _open_one(path: Place, label: str) -> OpenedFile:
    container = container_of(path.name)
    if container is None:
        known = f"known are {', '.join(weight_suffixes())} and *{INDEX_SUFFIX}"
        if path.name.lower().endswith(unread_suffixes()):
            raise CheckpointError(f"{path}: {path.suffix.lower()} files are not read; {known}")
        other = other_suffix(path)
        if other is not None:
            raise CheckpointError(f"{path}: {other}")
        raise CheckpointError(f"{path}: unknown format {path.suffix!r}; {known}")
    if container.is_read_whole and isinstance(path, RemotePath) and not path.is_on_disk:
        raise CheckpointError(f"{path}: {container.kind} is read whole, not by ranges of bytes; {path.store.copy}")
    with one_line_errors(path, kind=container.kind):
        file = StoredFile.at(path)
        _ = file.head  # empty files and pointers to elsewhere are told by themselves
        content = container.open(file, visible(label))
        check_names(visible(str(path)), content.tensors)
        check_shapes(visible(str(path)), (info.shape for info in content.tensors.values()))
    return OpenedFile(path=path, content=content)


def _open_shards(folder: Place, index_path: Place) -> tuple[dict[str, OpenedFile], dict[str, TensorInfo], list[str]]:
    """Open every shard of an index: (file of each tensor, catalogue, notes). Follows `weight_map`, no wildcard."""
    index = read_index(index_path)
    missing = [
        shard
        for shard, there in zip(
            index.shards, side_by_side(lambda shard: exists(folder / shard), index.shards, of=folder), strict=True
        )
        if not there
    ]
    if missing:
        raise CheckpointError(
            f"{index_path}: {counted(len(missing), 'shard')} of {len(index.shards)} not in the folder: "
            f"{listed(missing)}; download or copy the checkpoint again"
        )
    opened = side_by_side(lambda shard: open_weights(folder / shard, shard), index.shards, of=folder)
    shards = dict(zip(index.shards, opened, strict=True))
    for name, shard in index.weight_map.items():
        if name not in shards[shard].content.tensors:
            raise CheckpointError(
                f"{index_path}: tensor {name!r} should be in {shard}, but is not; index and shards do not fit together"
            )
    notes = [note for shard in shards.values() for note in shard.content.notes]
    extra = sorted({name for shard in shards.values() for name in shard.content.tensors} - set(index.weight_map))
    if extra:
        left_out = counted(len(extra), "tensor")
        notes.append(f"{index_path}: left out {left_out} that the index does not list: {listed(extra)}")
    sources = {name: shards[shard] for name, shard in index.weight_map.items()}
    return sources, {name: source.content.tensors[name] for name, source in sources.items()}, notes


def _files_of(tensors: Mapping[str, TensorInfo], opened: str) -> tuple[str, ...]:
    """Return the files that hold the tensors; the one that was opened if there are none."""
    return tuple(sorted({info.file for info in tensors.values()} or {opened}))


def _subfolders_with_weights(folder: Place) -> list[str]:
    """Return the names of direct subfolders that `open_directory` may take."""
    found = []
    for sub in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        try:
            names = [entry.name for entry in sub.iterdir()]
        except OSError:
            continue
        if any(is_weight_file(name) or name == DCP_METADATA for name in names):
            found.append(sub.name)
    return found
