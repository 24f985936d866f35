"""Keras models: `.keras` archives, `.weights.h5`, and the `.h5` of Keras 2 and of `tf_model.h5`.

Needs the extra `keras`, which is h5py; neither Keras nor TensorFlow is needed, and no code of a model is run. Keras
keeps kernels as [in, out] and [*kernel, in, out]; here they are [out, in] and [out, in, *kernel], as torch has them,
under the name `<layer>.weight`. What a dataset is follows from the layer's class, where the file names it
(`config.json` in the archive, the attribute `model_config`), or else from default names of layers and datasets.
"""

from __future__ import annotations

import io
import struct
import tempfile
import weakref
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from esdtool.checkpoint.base import DTYPE_BYTES, TensorInfo
from esdtool.checkpoint.formats.keras_names import Dataset, layer_settings, make_plans
from esdtool.checkpoint.heads import read_head
from esdtool.errors import CheckpointError, MissingExtraError
from esdtool.support.words import counted, listed, one_line

_ZIP_MAGIC = b"PK\x03\x04"
_WEIGHTS_MEMBER = "model.weights.h5"
_OPTIMIZERS = ("optimizer", "optimizer_weights")


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
        notes = [f"{path}: left out {len(odd)} datasets that are no numbers: {listed(odd)}"] if odd else []
        if len(kept) < len(datasets):
            notes.append(f"{path}: left out the optimizer's state ({len(datasets) - len(kept)} tensors)")
        self._plans, guessed = make_plans(kept, layer_settings(config), legacy=legacy)
        if guessed:
            layers = f"{counted(len(guessed), 'layer')} ({listed(guessed)})"
            notes.append(
                f"{path}: the file does not tell class or equation of {layers}: a 2-D array is taken for a "
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


def _datasets(file: Any, h5py: Any) -> tuple[list[Dataset], list[str]]:
    """(numeric arrays in the order of the file, paths of all others)."""
    found: list[Dataset] = []
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
        found.append(Dataset(path=path, shape=tuple(item.shape), dtype=dtype, names=names))

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
