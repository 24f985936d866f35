"""Keras models: `.keras` archives, `.weights.h5`, and the `.h5` of Keras 2 and of `tf_model.h5`.

Needs the extra `keras`, which is h5py; neither Keras nor TensorFlow is needed, and no code of a model is run. Keras
keeps kernels as [in, out] and [*kernel, in, out]; here they are [out, in] and [out, in, *kernel], as torch has them,
under the name `<layer>.weight`. What a dataset is follows from the layer's class, where the file names it
(`config.json` in the archive, the attribute `model_config`), or else from default names of layers and datasets.
"""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import torch

from esdtool.checkpoint.base import DTYPE_BYTES, TensorInfo
from esdtool.checkpoint.container import WeightFile
from esdtool.checkpoint.formats.keras.names import Dataset, layer_settings, make_plans
from esdtool.checkpoint.limits import (
    EXPANSION,
    JSON_BYTES,
    NAME_CHARACTERS,
    NAME_SEGMENTS,
    NODES,
    SMALL_BYTES,
    check_expansion,
    shortened,
)
from esdtool.checkpoint.stored_file import StoredFile
from esdtool.checkpoint.zip_member import zip_members
from esdtool.errors import CheckpointError, MissingExtraError
from esdtool.support.words import counted, listed, one_line

_ZIP_MAGIC = b"PK\x03\x04"
_WEIGHTS_MEMBER = "model.weights.h5"
_OPTIMIZERS = ("optimizer", "optimizer_weights")

_FILTERS = frozenset({1, 2, 3, 4, 5, 6, 32000})
"""Numbers of the filters that HDF5 and h5py bring along (deflate, shuffle, fletcher32, szip, nbit, scaleoffset, lzf).
For any other HDF5 would load a library that is called by its number."""


class KerasFile(WeightFile):
    """The weights of a Keras model, known by the headers of the HDF5 file.

    The weights in a `.keras` archive are read where they lie: Keras does not compress them. Where someone has, they
    are unpacked once into an unnamed temporary file, since HDF5 jumps back and forth and deflate cannot.
    """

    def __init__(self, file: StoredFile, label: str) -> None:
        """Read the structure of a file; `label` is its name within the checkpoint.

        Raises:
            MissingExtraError: without the package `h5py`.
            CheckpointError: if the file is damaged or not of Keras.
        """
        path = file.path
        self._h5py = _h5py(file)
        self._archive = file
        self._weights: StoredFile | None = file
        self._unpacked: IO[bytes] | None = None
        config: Any = None
        if file.head.startswith(_ZIP_MAGIC):
            config = self._open_archive()
        with self._open() as opened:
            datasets, odd = self._datasets(opened)
            legacy = any("layer_names" in group.attrs or "layer_names0" in group.attrs for group in _roots(opened))
            config = config if config is not None else opened.attrs.get("model_config")
        kept = [dataset for dataset in datasets if dataset.path.split("/")[0] not in _OPTIMIZERS]
        notes = [f"{path}: left out {len(odd)} datasets that are no numbers: {listed(odd)}"] if odd else []
        if len(kept) < len(datasets):
            notes.append(f"{path}: left out the optimizer's state ({counted(len(datasets) - len(kept), 'tensor')})")
        self._plans, guessed = make_plans(kept, layer_settings(config), legacy=legacy)
        if guessed:
            notes.append(
                f"{path}: the file does not tell class or equation of {counted(len(guessed), 'layer')} "
                f"({listed(guessed)}): a 2-D array is taken for a dense kernel, [in, out]; one of 3 dimensions is kept "
                "as it is"
            )
        self._dtypes = {dataset.path: dataset.dtype for dataset in kept}
        self.tensors = {
            name: TensorInfo(name=name, shape=plan.shape, dtype=self._dtypes[plan.path], file=label)
            for name, plan in self._plans.items()
        }
        self.notes = tuple(notes)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read one tensor, or some positions of its first dimension, from the part of the dataset that holds them."""
        plan = self._plans[name]
        partly = rows is not None and bool(plan.axes) and not plan.merged and not plan.update_first
        chosen = tuple(rows if partly and axis == plan.axes[0] else slice(None) for axis in range(len(plan.axes)))
        with self._open() as file:
            dataset = file[plan.path]
            self._check(dataset, f"{self._archive.path}: tensor {name!r}")
            array = np.asarray(dataset[chosen])
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
        """Find the weights within a `.keras` archive; returns its config.json, or None."""
        try:
            members = zip_members(self._archive)
        except CheckpointError as error:
            raise CheckpointError(
                f"{self._archive.path}: truncated or damaged zip archive; download or copy it again"
            ) from error
        member = members.get(_WEIGHTS_MEMBER)
        if member is None:
            raise CheckpointError(
                f"{self._archive.path}: a zip archive without {_WEIGHTS_MEMBER}: not one that Keras wrote in one file"
            )
        if member.is_stored:
            self._weights = member.stretch()
        else:
            self._unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the checkpoint
            weakref.finalize(self, self._unpacked.close)
            member.unpack(self._unpacked)
        return members["config.json"].read_all(JSON_BYTES) if "config.json" in members else None

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """The HDF5 file, opened for reading."""
        if self._unpacked is not None:
            with self._library(self._unpacked) as file:
                yield file
        else:
            assert self._weights is not None
            with self._weights.open() as plain, self._library(plain) as file:
                yield file

    def _library(self, source: IO[bytes]) -> Any:
        try:
            return self._h5py.File(source, "r")
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self._archive.path}: not an HDF5 file, or truncated: {one_line(error)}; download or copy it again"
            ) from error

    def _datasets(self, file: Any) -> tuple[list[Dataset], list[str]]:
        """(numeric arrays in the order of their names, paths of all others)."""
        found: list[Dataset] = []
        odd: list[str] = []
        for segments, names, dataset in self._walk(file):
            path = "/".join(segments)
            dtype = _dtype(dataset)
            if dtype is None or dataset.shape is None:
                odd.append(path)
            else:
                self._check(dataset, f"{self._archive.path}: dataset {shortened(path)!r}")
                found.append(Dataset(path=path, shape=tuple(dataset.shape), dtype=dtype, names=names))
        return found, odd

    def _walk(self, file: Any) -> Iterator[tuple[tuple[str, ...], tuple[str | None, ...], Any]]:
        """(path, layers' own names of the groups on it, dataset), each dataset once, whatever links lead to it.

        HDF5's own visit follows groups without a limit to their depth.
        """
        h5o = self._h5py.h5o
        seen = {h5o.get_info(file.id).addr}
        todo: list[tuple[tuple[str, ...], tuple[str | None, ...], Any]] = [((), (), file)]
        while todo:
            above, names, item = todo.pop()
            if isinstance(item, self._h5py.Dataset):
                yield above, names, item
            if not isinstance(item, self._h5py.Group):
                continue
            names = (*names, _own_name(item)) if above else ()
            below = []
            for name in sorted(item.keys()):
                member = _member(item, name)
                if member is None or (address := h5o.get_info(member.id).addr) in seen:
                    continue
                seen.add(address)
                path = (*above, name)
                if len(seen) > NODES or len(path) > NAME_SEGMENTS or sum(map(len, path)) > NAME_CHARACTERS:
                    raise CheckpointError(
                        f"{self._archive.path}: refused: too many objects, or nested too deeply: "
                        f"{shortened('/'.join(path))}"
                    )
                below.append((path, names, member))
            todo += reversed(below)

    def _check(self, dataset: Any, what: str) -> None:
        """Refuse data that lie elsewhere, or that are far larger than what is stored of them.

        Raises:
            CheckpointError: for external and virtual datasets, unknown filters, unwritten data and oversized chunks.
        """
        if dataset.is_virtual or dataset.external:
            raise CheckpointError(f"{what}: refused: its data lie in another file")
        plan = dataset.id.get_create_plist()
        filters = {plan.get_filter(number)[0] for number in range(plan.get_nfilters())}
        if not filters <= _FILTERS:
            raise CheckpointError(f"{what}: compressed with filter {min(filters - _FILTERS)}, which is not read")
        stored = int(dataset.id.get_storage_size())
        width = dataset.dtype.itemsize
        check_expansion(what, math.prod(dataset.shape) * width, stored)
        if dataset.chunks is not None and math.prod(dataset.chunks) * width > max(SMALL_BYTES, EXPANSION * stored):
            raise CheckpointError(f"{what}: refused: chunks of {list(dataset.chunks)} for {stored} stored bytes")


def _h5py(file: StoredFile) -> Any:
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"{file.path}: reading a Keras file", "keras") from error
    return h5py


def _roots(file: Any) -> list[Any]:
    """Return the groups that may list layers: of a file with weights alone, and of a whole model."""
    weights = _member(file, "model_weights")
    return [file] if weights is None else [file, weights]


def _own_name(group: Any) -> str | None:
    """Return the name of the layer that a group holds: an attribute of its `vars`, in recent versions of Keras."""
    variables = _member(group, "vars")
    name = variables.attrs.get("name") if variables is not None else None
    return name if isinstance(name, str) and name else None


def _member(group: Any, name: str) -> Any:
    """Return a member of a group by a link within the file; None if there is none, or a link that leads elsewhere."""
    import h5py

    link = group.get(name, getlink=True) if hasattr(group, "keys") and name in group.keys() else None  # noqa: SIM118
    return group[name] if isinstance(link, h5py.HardLink) else None


def _dtype(dataset: Any) -> str | None:
    """Name a dataset's type as torch does; None if it is not a number. Keras marks bfloat16, which HDF5 lacks."""
    mark = dataset.attrs.get("dtype")
    if isinstance(mark, str) and mark == "bfloat16" and dataset.dtype.itemsize == 2:
        return "bfloat16"
    name = str(dataset.dtype.newbyteorder("=").name)
    return name if dataset.dtype.kind in "fiubc" and name in DTYPE_BYTES else None
