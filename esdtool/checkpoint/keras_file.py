"""Keras models: `.keras` archives, `.weights.h5`, and the `.h5` of Keras 2 and of `tf_model.h5`.

Needs the extra `keras`, which is h5py; neither Keras nor TensorFlow is needed, and no code of a model is run. Keras
keeps kernels as [in, out] and [*kernel, in, out]; here they are [out, in] and [out, in, *kernel], as torch has them,
under the name `<layer>.weight`. What a dataset is follows from the layer's class, where the file names it
(`config.json` in the archive, the attribute `model_config`), or else from default names of layers and datasets.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import tempfile
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from esdtool.checkpoint.base import DTYPE_BYTES, TensorInfo
from esdtool.checkpoint.heads import one_line, read_head
from esdtool.errors import CheckpointError, MissingExtraError

_ZIP_MAGIC = b"PK\x03\x04"
_WEIGHTS_MEMBER = "model.weights.h5"
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")
"""Groups of Keras 3 whose members are named after their class; the layer's own name is an attribute."""
_OPTIMIZERS = ("optimizer", "optimizer_weights")
_PROJECTIONS = {
    # Sublayers of MultiHeadAttention, by attribute in Keras 3 and by name in Keras 2
    "query_dense": "query",
    "key_dense": "key",
    "value_dense": "value",
    "output_dense": "attention_output",
}

_KERNEL_FIRST = ("kernel", "bias")
_VARIABLES: dict[str, tuple[str, ...]] = {
    "Dense": _KERNEL_FIRST,
    "EinsumDense": _KERNEL_FIRST,
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _KERNEL_FIRST),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _KERNEL_FIRST),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), ("depthwise_kernel", "bias")),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), ("depthwise_kernel", "pointwise_kernel", "bias")),
    "Embedding": ("embeddings",),
    **dict.fromkeys(("LSTMCell", "GRUCell", "SimpleRNNCell"), ("kernel", "recurrent_kernel", "bias")),
    **dict.fromkeys(("LSTM", "GRU", "SimpleRNN"), ("kernel", "recurrent_kernel", "bias")),
}
"""What the numbered variables of a layer are, by class."""


def _snake(name: str) -> str:
    """Keras's default name of a layer of a class: `Conv2DTranspose` is `conv2d_transpose`."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", name)).lower()


_CLASS_OF_DEFAULT_NAME = {_snake(name): name for name in _VARIABLES}


@dataclass(frozen=True, kw_only=True)
class _Dataset:
    """One array of the file, from its header."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    names: tuple[str | None, ...]
    """The layers' own names, for each group on the path to the dataset."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How a tensor comes from a dataset: axes in this order, then this shape."""

    path: str
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    merged: bool = False
    """Whether the shape is another than that of the axes in order."""
    update_first: bool = False
    """Rows are the gates update, reset, new (Keras's GRU), and are given as reset, update, new (torch's)."""


class KerasFile:
    """The weights of a Keras model, known by the headers of the HDF5 file.

    The weights in a `.keras` archive are read where they lie: Keras does not compress them. Where someone has, they
    are unpacked once into an unnamed temporary file, since HDF5 jumps back and forth and deflate cannot.
    """

    def __init__(self, path: Path, label: str) -> None:
        """Read the structure of `path`; `label` is its name within the checkpoint.

        Raises:
            MissingExtraError: without the package `h5py`.
            CheckpointError: if the file is damaged or not of Keras.
        """
        _h5py(path)
        self._path = path
        self._window: tuple[int, int] | None = None
        self._unpacked: IO[bytes] | None = None
        config: Any = None
        if read_head(path).startswith(_ZIP_MAGIC):
            config = self._open_archive()
        with self._open() as file:
            datasets, odd = _datasets(file, _h5py(path))
            legacy = any("layer_names" in group.attrs or "layer_names0" in group.attrs for group in _roots(file))
            config = config if config is not None else file.attrs.get("model_config")
        kept = [dataset for dataset in datasets if dataset.path.split("/")[0] not in _OPTIMIZERS]
        notes = [f"{path}: left out {len(odd)} datasets that are no numbers: {', '.join(odd[:3])}"] if odd else []
        if len(kept) < len(datasets):
            notes.append(f"{path}: left out the optimizer's state ({len(datasets) - len(kept)} tensors)")
        self._plans, guessed = _plans(kept, _layers(config), legacy=legacy)
        if guessed:
            layers = f"{len(guessed)} layer{'s' if len(guessed) > 1 else ''}"
            listed = ", ".join(guessed[:3]) + (", ..." if len(guessed) > 3 else "")
            notes.append(
                f"{path}: the file does not tell class or equation of {layers} ({listed}): a 2-D array is taken for a "
                "dense kernel, [in, out]; one of 3 dimensions is kept as it is"
            )
        dtypes = {dataset.path: dataset.dtype for dataset in kept}
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(name=name, shape=plan.shape, dtype=dtypes[plan.path], file=label)
            for name, plan in self._plans.items()
        }
        self._dtypes = dtypes
        self.notes: tuple[str, ...] = tuple(notes)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read one tensor, or some positions of its first dimension, from the part of the dataset that holds them."""
        plan = self._plans[name]
        partly = rows is not None and bool(plan.axes) and not plan.merged and not plan.update_first
        chosen = tuple(rows if partly and axis == plan.axes[0] else slice(None) for axis in range(len(plan.axes)))
        try:
            with self._open() as file:
                array = np.asarray(file[plan.path][chosen])
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self._path}: tensor {name!r}: cannot read: {one_line(error)}") from error
        if self._dtypes[plan.path] == "bfloat16":
            tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        tensor = tensor.permute(plan.axes)
        if partly:
            return tensor
        tensor = tensor.reshape(plan.shape)
        if plan.update_first:
            update, reset, new = tensor.chunk(3)
            tensor = torch.cat([reset, update, new])
        return tensor if rows is None else tensor[rows]

    def _open_archive(self) -> Any:
        """Find the weights within a `.keras` archive; returns its config.json as text, or None."""
        try:
            with zipfile.ZipFile(self._path) as archive:
                names = archive.namelist()
                if _WEIGHTS_MEMBER not in names:
                    raise CheckpointError(
                        f"{self._path}: a zip archive without {_WEIGHTS_MEMBER}: not one that Keras wrote in one file"
                    )
                member = archive.getinfo(_WEIGHTS_MEMBER)
                if member.compress_type == zipfile.ZIP_STORED:
                    self._window = (_data_offset(self._path, member), member.file_size)
                else:
                    self._unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the checkpoint
                    weakref.finalize(self, self._unpacked.close)
                    with archive.open(member) as packed:
                        while chunk := packed.read(1 << 20):
                            self._unpacked.write(chunk)
                return archive.read("config.json") if "config.json" in names else None
        except CheckpointError:
            raise
        # Arbitrary bytes in the directory: bad text, sizes beyond the file, unknown versions, ...
        except Exception as error:
            raise CheckpointError(
                f"{self._path}: truncated or damaged zip archive: {one_line(error)}; download or copy it again"
            ) from error

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """The HDF5 file, opened for reading."""
        h5py = _h5py(self._path)
        with self._path.open("rb") as plain:
            source: Any = plain
            if self._unpacked is not None:
                source = self._unpacked
            elif self._window is not None:
                source = _Window(plain, *self._window)
            try:
                file = h5py.File(source, "r")
            except (OSError, ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"{self._path}: not an HDF5 file, or truncated: {one_line(error)}; download or copy it again"
                ) from error
            with file:
                yield file


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._position))
        self._file.seek(self._start + self._position)
        data = self._file.read(count)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def _h5py(path: Path) -> Any:
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"{path}: reading a Keras file", "keras") from error
    return h5py


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where an uncompressed member's bytes begin: after its local header of 30 bytes, a name and an extra field."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
    if len(header) < 30 or not header.startswith(_ZIP_MAGIC):
        raise zipfile.BadZipFile("bad local header")
    name, extra = struct.unpack("<HH", header[26:30])
    return int(member.header_offset + 30 + name + extra)


def _roots(file: Any) -> list[Any]:
    """The groups that may list layers: of a file with weights alone, and of a whole model."""
    return [file, *([file["model_weights"]] if "model_weights" in file else [])]


def _datasets(file: Any, h5py: Any) -> tuple[list[_Dataset], list[str]]:
    """(numeric arrays in the order of the file, paths of all others)."""
    found: list[_Dataset] = []
    odd: list[str] = []

    def visit(path: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        dtype = _dtype(item)
        if dtype is None or item.shape is None:
            odd.append(path)
            return
        groups = path.split("/")[:-1]
        names = tuple(_own_name(file, groups[:depth]) for depth in range(1, len(groups) + 1))
        found.append(_Dataset(path=path, shape=tuple(item.shape), dtype=dtype, names=names))

    file.visititems(visit)
    return found, odd


def _own_name(file: Any, groups: list[str]) -> str | None:
    """The name of the layer that a group holds: an attribute of its `vars`, in recent versions of Keras."""
    variables = file["/".join(groups)].get("vars")
    name = variables.attrs.get("name") if variables is not None else None
    return name if isinstance(name, str) and name else None


def _dtype(dataset: Any) -> str | None:
    """torch's name of a dataset's type; None if it is no number. HDF5 knows no bfloat16: Keras marks its own."""
    mark = dataset.attrs.get("dtype")
    if mark == "bfloat16" and dataset.dtype.itemsize == 2:
        return "bfloat16"
    name = str(dataset.dtype.newbyteorder("=").name)
    return name if dataset.dtype.kind in "fiubc" and name in DTYPE_BYTES else None


def _layers(config: Any) -> dict[str, Mapping[str, Any]]:
    """The configuration of each layer, by name, anywhere in a model's configuration; a name of two classes is none."""
    try:
        tree = json.loads(config) if isinstance(config, str | bytes) else None
    except (ValueError, RecursionError):
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    ambiguous: set[str] = set()
    todo = [tree]
    while todo:
        item = todo.pop()
        todo += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        if not isinstance(item, dict) or not isinstance(item.get("class_name"), str):
            continue
        settings = item.get("config")
        name = settings.get("name") if isinstance(settings, dict) else None
        if isinstance(name, str):
            if name in found and found[name]["class_name"] != item["class_name"]:
                ambiguous.add(name)
            found[name] = item
    return {name: item for name, item in found.items() if name not in ambiguous}


def _plans(
    datasets: list[_Dataset], layers: Mapping[str, Mapping[str, Any]], *, legacy: bool
) -> tuple[dict[str, _Plan], list[str]]:
    """(what becomes of each dataset, by the tensor's name; the layers whose class is a guess)."""
    plans: dict[str, _Plan] = {}
    guessed: list[str] = []
    shapes = {dataset.path: dataset.shape for dataset in datasets}
    for dataset in datasets:
        module, leaf, names = _legacy_name(dataset) if legacy else _name(dataset)
        settings = layers.get(names[0], {}) if names else {}
        kind: str | None = settings.get("class_name") or next(filter(None, map(_default_class, names)), None)
        if kind in (None, "Dense") and module and module[-1] in _PROJECTIONS.values():
            group = dataset.path.rpartition("/")[0]
            if any(len(shapes.get(f"{group}/{kernel}", ())) == 3 for kernel in ("0", "kernel", "kernel:0")):
                kind = "EinsumDense"
        role = leaf
        if leaf.isdecimal():
            known = _VARIABLES.get(kind or "", ())
            role = known[int(leaf)] if int(leaf) < len(known) else f"vars.{leaf}"
            if not known:
                role = _guess(dataset, shapes) or role
        recurrent = (kind or "").removesuffix("Cell") in ("LSTM", "GRU", "SimpleRNN") or _has_recurrent(dataset, shapes)
        name, plan = _plan(dataset, module, role, kind, settings, recurrent=recurrent)
        if len(dataset.shape) > 1 and role == "kernel" and (kind not in _VARIABLES or name.endswith(".kernel")):
            guessed.append(".".join(module))
        plans[name if name not in plans else dataset.path.replace("/", ".")] = plan
    return plans, guessed


def _legacy_name(dataset: _Dataset) -> tuple[list[str], str, list[str]]:
    """(module, leaf, names of the layer) of `[model_weights/]dense/dense/kernel:0`: a layer, then a weight's name."""
    segments = dataset.path.removeprefix("model_weights/").split("/")
    layer, weight = segments[0], segments[1:] or segments
    *module, leaf = weight if layer in weight else [layer, *weight]
    # Transformers' TensorFlow models write `layer_._0` for `layer.0`.
    module = [part for segment in module for part in segment.split("_._")]
    return module, leaf.partition(":")[0], module[-1:]


def _name(dataset: _Dataset) -> tuple[list[str], str, list[str]]:
    """(module, leaf, names of the layer) of Keras 3's `layers/dense/vars/0`, or of any other path."""
    *groups, leaf = dataset.path.split("/")
    if groups[-1:] == ["vars"] and leaf.isdecimal():
        groups.pop()
    own = dataset.names[: len(groups)]
    module = []
    for depth, segment in enumerate(groups):
        contained = depth > 0 and groups[depth - 1] in _CONTAINERS
        if segment not in _CONTAINERS:
            module.append((own[depth] if contained else None) or _PROJECTIONS.get(segment, segment))
    # The cell of a recurrent layer has no class in its name where only the layer's group has one.
    names = [name for name in (own[-1] if own else None, *groups[: -3 if groups[-1:] == ["cell"] else -2 : -1]) if name]
    return module, leaf, names


def _default_class(name: str) -> str | None:
    """The class whose default name this is: `dense_3` is a Dense."""
    return _CLASS_OF_DEFAULT_NAME.get(name) or _CLASS_OF_DEFAULT_NAME.get(re.sub(r"_\d+$", "", name))


def _guess(dataset: _Dataset, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a numbered variable of a layer of unknown class may be: a matrix is a kernel, what it feeds is a bias."""
    number = dataset.path.rpartition("/")[2]
    if number == "0" and len(dataset.shape) >= 2:
        return "kernel"
    if number == "1" and _has_recurrent(dataset, shapes):
        return "recurrent_kernel"
    return None


def _has_recurrent(dataset: _Dataset, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a recurrent kernel [units, gates * units] lies beside a kernel [in, gates * units]."""
    group = dataset.path.rpartition("/")[0]
    suffix = ":0" if dataset.path.endswith(":0") else ""
    if f"{group}/recurrent_kernel{suffix}" in shapes:
        return True
    first, second = shapes.get(f"{group}/0", ()), shapes.get(f"{group}/1", ())
    if group.split("/")[-2:-1] != ["cell"] or len(first) != 2 or len(second) != 2:
        return False
    return first[1] == second[1] and second[0] > 0 and second[1] % second[0] == 0


def _plan(
    dataset: _Dataset, module: list[str], role: str, kind: str | None, settings: Mapping[str, Any], *, recurrent: bool
) -> tuple[str, _Plan]:
    """(name, plan) of one dataset of which role and class are known, or not."""
    shape = dataset.shape
    rank = len(shape)
    layer = ".".join(module)
    kernel = tuple(range(rank - 2))

    def plan(axes: tuple[int, ...], leaf: str, merged: tuple[int, ...] | None = None) -> tuple[str, _Plan]:
        turned = merged or tuple(shape[axis] for axis in axes)
        gru = recurrent and leaf.startswith("weight_") and (kind or layer.rpartition(".")[2]).lower().startswith("gru")
        return ".".join(filter(None, (layer, leaf))), _Plan(
            path=dataset.path,
            axes=axes,
            shape=turned,
            merged=merged is not None,
            update_first=gru and turned[0] % 3 == 0,
        )

    if role == "recurrent_kernel" and rank == 2:
        return plan((1, 0), "weight_hh_l0")
    if role == "kernel" and rank == 2 and recurrent:
        return plan((1, 0), "weight_ih_l0")
    if role == "kernel" and (kind or "").startswith("Depthwise"):
        role = "depthwise_kernel"
    if role == "depthwise_kernel" and rank > 2:
        leaf = "depthwise.weight" if (kind or "").startswith("Separable") else "weight"
        sizes = tuple(shape[axis] for axis in kernel)
        return plan((rank - 2, rank - 1, *kernel), leaf, (shape[-2] * shape[-1], 1, *sizes))
    if role == "pointwise_kernel" and rank > 2:
        return plan((rank - 1, rank - 2, *kernel), "pointwise.weight")
    if role == "kernel" and rank == 2 and kind != "EinsumDense":
        return plan((1, 0), "weight")
    if role == "kernel" and kind == "EinsumDense":
        split = _einsum(settings, rank) or _projection(module[-1] if module else "", rank)
        if split is not None:
            outputs, inputs = split
            merged = (math.prod(shape[axis] for axis in outputs), math.prod(shape[axis] for axis in inputs))
            return plan((*outputs, *inputs), "weight", merged)
        if rank == 2:
            return plan((1, 0), "weight")
    if role == "kernel" and rank > 2 and (kind or "").endswith("DTranspose"):
        return plan((rank - 2, rank - 1, *kernel), "weight")
    if role == "kernel" and rank > 2 and ((kind or "").startswith("Conv") or (rank > 3 and kind is None)):
        return plan((rank - 1, rank - 2, *kernel), "weight")
    return plan(tuple(range(rank)), role)


def _einsum(settings: Mapping[str, Any], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(output axes, input axes) of an EinsumDense kernel from its equation, e.g. `abc,cde->abde`: (1, 2), (0,)."""
    config = settings.get("config")
    equation = config.get("equation") if isinstance(config, Mapping) else None
    match = re.fullmatch(r"(.*),(\w+)->(.*)", equation.replace(" ", "")) if isinstance(equation, str) else None
    if match is None or len(match[2]) != rank:
        return None
    outputs = tuple(axis for axis, letter in enumerate(match[2]) if letter in match[3])
    inputs = tuple(axis for axis, letter in enumerate(match[2]) if letter in match[1])
    # A letter on both sides is a batch of matrices, not one.
    return (outputs, inputs) if outputs and inputs and not set(outputs) & set(inputs) else None


def _projection(name: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The same for MultiHeadAttention's: [in, heads, width] of a query, [heads, width, out] of the output."""
    if rank != 3 or name not in _PROJECTIONS.values():
        return None
    return ((2,), (0, 1)) if name == "attention_output" else ((1, 2), (0,))
