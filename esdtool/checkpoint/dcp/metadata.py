"""The `.metadata` of a torch.distributed.checkpoint folder: which tensors there are, and where their parts lie.

The file is a pickle of torch's own records (`torch.distributed.checkpoint.metadata`). It is read as plain data, and
every record is checked here: torch would unpickle it without a guard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from esdtool.checkpoint.base import DTYPE_BYTES
from esdtool.checkpoint.formats.torch_save.plain_pickle import CallsCodeError, Instance, PickleError, Symbol, load_plain
from esdtool.checkpoint.jsonfiles import leaves_folder
from esdtool.checkpoint.limits import DIMENSIONS, PICKLE_BYTES
from esdtool.checkpoint.stored_file import Place, StoredFile
from esdtool.errors import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_SIZE = Symbol("torch", "Size")
_LAYOUT = Symbol("torch.serialization", "_get_layout")
_DTYPES = {Symbol("torch", name): name for name in DTYPE_BYTES}
_RECORDS = {
    name: Symbol(_METADATA, name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {name: Symbol(_FILESYSTEM, name) for name in ("_StorageInfo", "_StoragePrefix")}
_PATHS = {
    Symbol(module, name)
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
}
_ADMITTED = frozenset(
    {_SIZE, _LAYOUT, Symbol("collections", "OrderedDict"), *_DTYPES, *_RECORDS.values(), *_PATHS},
)
_LAYOUTS = frozenset({"torch.strided", "torch.sparse_coo", "torch.sparse_csr", "torch.sparse_csc", "torch.jagged"})

MOST_PATH_SEGMENTS = 32
MOST_OPERATIONS = 50_000_000
"""Length of the pickle in operations. Each part of a tensor takes about seventy, where it lies included."""

MOST_CELLS = 2**24
"""Cells of the grid into which a tensor's parts cut it; parts of a regular sharding have one each."""

CELLS_OF_PART = 4096
"""The same for each part. The parts of flattened shards of a thousand ranks come to two thousand each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPart:
    """One rank's part of a tensor, and where it lies."""

    offsets: tuple[int, ...]
    """First position in the tensor, for each dimension."""
    sizes: tuple[int, ...]
    """Shape of the part."""
    file: str
    """Relative to the folder."""
    start: int
    """First byte in the file."""
    length: int
    """Bytes in the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor of the folder's catalogue. Its parts cover it without gaps and overlaps."""

    key: str
    """Key of the tensor in `.metadata`."""
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[StoredPart, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The files that hold its parts, each once, sorted."""
        return tuple(sorted({part.file for part in self.parts}))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Location:
    """The place of a part's bytes."""

    file: str
    start: int
    length: int


def read_metadata(path: Place) -> dict[str, Any]:
    """Return the structure of the saved state dict, with a `StoredTensor` for each tensor and None for anything else.

    Raises:
        CheckpointError: if the file is unsafe, damaged, or describes tensors of which parts are missing or overlap.
    """
    file = StoredFile.at(path)
    _ = file.head
    try:
        root = load_plain(file.read_all(PICKLE_BYTES), _ADMITTED, most_operations=MOST_OPERATIONS)
        if not isinstance(root, Instance) or root.symbol != _RECORDS["Metadata"]:
            raise CheckpointError(f"{path}: not the metadata of torch.distributed.checkpoint")
        return _tree(path, _fields(root, "Metadata"))
    except CallsCodeError as error:
        raise CheckpointError(f"{path}: refused: its pickle calls code ({error.what}), which is never run") from error
    except PickleError as error:
        raise CheckpointError(
            f"{path}: not the metadata of torch.distributed.checkpoint, or damaged: {error}"
        ) from error


def _tree(path: Place, metadata: Mapping[str, Any]) -> dict[str, Any]:
    locations = _locations(path, _get(metadata, "Metadata", "storage_data"))
    planned = metadata.get("planner_data")
    paths: Mapping[Any, Any] = planned if isinstance(planned, dict) else {}
    root: dict[str, Any] = {}
    stored = _get(metadata, "Metadata", "state_dict_metadata")
    if not isinstance(stored, dict):
        raise PickleError("its catalogue is no dict")
    for key, record in stored.items():
        if not isinstance(key, str) or not isinstance(record, Instance):
            raise PickleError("an entry of its catalogue is no record under a name")
        tensor = _tensor(path, key, record, locations) if _is(record, "TensorStorageMetadata") else None
        *above, last = _segments(paths.get(key, (key,)))
        node = root
        for segment in above:
            node = node.setdefault(segment, {})
            if not isinstance(node, dict):
                raise PickleError(f"tensor {key!r} lies below another tensor")
        if last in node:
            raise PickleError(f"two entries have the place of {key!r}")
        node[last] = tensor
    return root


def _tensor(path: Place, key: str, record: Instance, locations: Mapping[tuple[str, Any], _Location]) -> StoredTensor:
    """Return one tensor's entry, checked."""
    fields = _fields(record, "TensorStorageMetadata")
    shape = _size(_get(fields, "TensorStorageMetadata", "size"))
    dtype = _dtype(_get(fields, "TensorStorageMetadata", "properties"))
    chunks = _get(fields, "TensorStorageMetadata", "chunks")
    if not isinstance(chunks, list):
        raise PickleError(f"the parts of tensor {key!r} are no list")
    boxes = []
    for chunk in chunks:
        part = _fields(chunk, "ChunkStorageMetadata")
        boxes.append(tuple(_size(_get(part, "ChunkStorageMetadata", name)) for name in ("offsets", "sizes")))
    if reason := _misfit(shape, boxes):
        raise CheckpointError(f"{path}: tensor {key!r}: {reason}")
    parts = []
    for offsets, sizes in boxes:
        location = locations.get((key, offsets))
        if location is None:
            raise CheckpointError(
                f"{path}: tensor {key!r}: its part at {list(offsets)} lies in no file; the checkpoint is incomplete"
            )
        if math.prod(sizes) * DTYPE_BYTES[dtype] > location.length:
            raise CheckpointError(
                f"{path}: tensor {key!r}: damaged: its part at {list(offsets)} is {list(sizes)} of {dtype} "
                f"in {location.length} bytes"
            )
        parts.append(
            StoredPart(offsets=offsets, sizes=sizes, file=location.file, start=location.start, length=location.length)
        )
    for one, other in pairwise(sorted(parts, key=lambda part: (part.file, part.start))):
        if one.file == other.file and one.start + one.length > other.start:
            raise CheckpointError(f"{path}: tensor {key!r}: damaged: two of its parts share bytes of {one.file}")
    return StoredTensor(key=key, shape=shape, dtype=dtype, parts=tuple(parts))


def _locations(path: Place, storage: Any) -> dict[tuple[str, Any], _Location]:
    """Find the place of each part, by its tensor's key and its first position.

    Raises:
        CheckpointError: if a file lies outside the folder, or is compressed.
    """
    if not isinstance(storage, dict):
        raise PickleError("its list of files is no dict")
    found: dict[tuple[str, Any], _Location] = {}
    for index, info in storage.items():
        place, where = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        key, offset = _get(place, "MetadataIndex", "fqn"), place.get("offset")
        file, start, length = (_get(where, "_StorageInfo", name) for name in ("relative_path", "offset", "length"))
        if not isinstance(key, str) or not isinstance(file, str):
            raise PickleError("a name of a tensor or a file is no text")
        if leaves_folder(file):
            raise CheckpointError(
                f"{path}: tensor {key!r}: refused: file {file!r} lies outside the checkpoint's folder"
            )
        if not _is_count(start) or not _is_count(length):
            raise PickleError(f"tensor {key!r} has no position in its file")
        if where.get("transform_descriptors"):
            raise CheckpointError(
                f"{path}: tensor {key!r}: its bytes are compressed, which is not read; save the checkpoint without "
                "stream extensions"
            )
        found[key, None if offset is None else _size(offset)] = _Location(file=file, start=start, length=length)
    return found


def _misfit(shape: tuple[int, ...], boxes: Sequence[Sequence[tuple[int, ...]]]) -> str:
    """Explain why boxes (offsets, sizes) do not tile a shape; empty if each element is in exactly one."""
    for offsets, sizes in boxes:
        inside = len(offsets) == len(sizes) == len(shape) and all(
            offset + size <= length for offset, size, length in zip(offsets, sizes, shape, strict=True)
        )
        if not inside:
            return f"damaged: a part {list(sizes)} at {list(offsets)} sticks out of {list(shape)}"
    count, whole = sum(math.prod(sizes) for _, sizes in boxes), math.prod(shape)
    if count < whole:
        return f"only {count} of {whole} elements were saved; the checkpoint is incomplete"
    # Cut the tensor at every edge of a part: each cell of that grid must lie in one part.
    edges = [
        np.unique([0, length, *(edge for box in boxes for edge in (box[0][axis], box[0][axis] + box[1][axis]))])
        for axis, length in enumerate(shape)
    ]
    cells_of_axes = [len(axis) - 1 for axis in edges]
    if math.prod(cells_of_axes) > min(MOST_CELLS, CELLS_OF_PART * (len(boxes) + 1)):
        return f"damaged: its {len(boxes)} parts cut it into {math.prod(cells_of_axes)} pieces"
    taken = np.zeros(cells_of_axes, dtype=bool)
    for offsets, sizes in boxes:
        cells = tuple(
            slice(*np.searchsorted(axis, [offset, offset + size]))
            for axis, offset, size in zip(edges, offsets, sizes, strict=True)
        )
        if taken[cells].any():
            return "damaged: its saved parts overlap"
        taken[cells] = True
    return ""


def _fields(value: Any, record: str) -> Mapping[str, Any]:
    """Return the attributes of a record."""
    if not _is(value, record):
        raise PickleError(f"a record is no {record}")
    if not isinstance(value.state, dict):
        raise PickleError(f"a {record} without attributes")
    return value.state


def _get(fields: Mapping[str, Any], record: str, name: str) -> Any:
    if name not in fields:
        raise PickleError(f"{record!r} object has no attribute {name!r}")
    return fields[name]


def _is(value: Any, record: str) -> bool:
    return isinstance(value, Instance) and value.symbol == _RECORDS[record]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _size(value: Any) -> tuple[int, ...]:
    """Return the numbers of a `torch.Size`."""
    sizes = value.arguments[0] if isinstance(value, Instance) and value.symbol == _SIZE and value.arguments else None
    if not isinstance(sizes, tuple | list) or len(sizes) > DIMENSIONS or not all(map(_is_count, sizes)):
        raise PickleError("a shape is no list of a few numbers")
    return tuple(sizes)


def _dtype(properties: Any) -> str:
    """The dtype in a tensor's properties, which are a tuple: dtype, layout, requires_grad, memory format, pinned."""
    if not _is(properties, "TensorProperties"):
        raise PickleError("a record is no TensorProperties")
    state = properties.state
    if not isinstance(state, tuple) or len(state) < 2 or not isinstance(state[0], Symbol) or state[0] not in _DTYPES:
        raise PickleError("a tensor's dtype is not known")
    layout = state[1].arguments if isinstance(state[1], Instance) and state[1].symbol == _LAYOUT else None
    if not isinstance(layout, tuple) or len(layout) != 1 or layout[0] not in _LAYOUTS:
        raise PickleError("a tensor's layout is not known")
    return _DTYPES[state[0]]


def _segments(path: Any) -> Iterator[str]:
    """Yield the keys under which a tensor lay in the saved state dict."""
    if not isinstance(path, tuple | list) or not 0 < len(path) <= MOST_PATH_SEGMENTS:
        raise PickleError("a tensor's place in the state dict is no short list of keys")
    for segment in path:
        if type(segment) is not str and not (type(segment) is int and abs(segment) < 2**62):
            raise PickleError("a tensor's place in the state dict is no list of names and numbers")
        yield str(segment)
