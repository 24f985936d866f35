"""One file that `torch.save` wrote, as a catalogue of lazy tensors. No code of it is run: its pickle is plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esdtool.checkpoint.base import DTYPE_BYTES, TensorInfo
from esdtool.checkpoint.container import WeightFile
from esdtool.checkpoint.formats.torch_save.archive import Saved, open_saved
from esdtool.checkpoint.formats.torch_save.saved_tensor import SavedTensor, TensorKind
from esdtool.checkpoint.limits import check_expansion
from esdtool.checkpoint.state_dict import ModelTensors, model_tensors
from esdtool.checkpoint.stored_file import StoredFile
from esdtool.errors import CheckpointError
from esdtool.support.words import counted, listed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


class TorchSaveFile(WeightFile):
    """A state dict on disk. Tensors are read one at a time, and of a view only the bytes that it spans."""

    def __init__(self, file: StoredFile, label: str) -> None:
        """Read the structure of a file; `label` is its name within the checkpoint.

        Raises:
            CheckpointError: if it is no file of torch.save, is damaged, or holds code.
        """
        self._file = file
        self._saved = open_saved(file)
        found: ModelTensors[SavedTensor] = model_tensors(self._saved.tree, _is_tensor, file=str(file.path))
        nested = [name for name, tensor in found.tensors.items() if tensor.kind is TensorKind.NESTED]
        self._tensors = {name: tensor for name, tensor in found.tensors.items() if tensor.kind is not TensorKind.NESTED}
        self.tensors = {
            name: TensorInfo(name=name, shape=tensor.shape, dtype=tensor.dtype, file=label)
            for name, tensor in self._tensors.items()
        }
        self.notes = found.notes
        if nested:
            self.notes += (f"{file.path}: left out {counted(len(nested), 'nested tensor')}: {listed(nested)}",)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read one tensor, or some rows of it. A sparse one becomes dense."""
        return read_saved(self._saved, self._tensors[name], f"{self._file.path}: tensor {name!r}", rows)


def read_single(file: StoredFile, what: str) -> torch.Tensor:
    """Return the one tensor that was saved in a file, or in a stretch of one.

    Args:
        file: the stretch.
        what: file and tensor, for messages.

    Raises:
        CheckpointError: if it holds anything else.
    """
    saved = open_saved(file)
    if not isinstance(saved.tree, SavedTensor):
        raise CheckpointError(f"{what}: cannot read: damaged: no tensor")
    return read_saved(saved, saved.tree, what)


def read_saved(saved: Saved, tensor: SavedTensor, what: str, rows: slice | None = None) -> torch.Tensor:
    """Read a tensor whose place is known.

    Raises:
        CheckpointError: if it has no data, its numbers do not fit its storage, or it is made of far fewer bytes.
    """
    if tensor.kind is TensorKind.META:
        raise CheckpointError(f"{what}: saved without data (meta device)")
    if tensor.kind is TensorKind.QUANTIZED:
        raise CheckpointError(f"{what}: with torch's own quantisation ({tensor.dtype}), which is not read")
    if tensor.kind is TensorKind.SPARSE:
        dense = _dense(saved, tensor, what)
        return dense if rows is None else dense[rows]
    if rows is not None and tensor.shape:
        start, stop, _ = rows.indices(tensor.shape[0])
        tensor = tensor.rows(start, max(start, stop))
    return tensor.view(_bytes(saved, tensor, what))


def _bytes(saved: Saved, tensor: SavedTensor, what: str) -> npt.NDArray[np.uint8]:
    """Return the bytes that a dense tensor spans, in the machine's own order."""
    width = DTYPE_BYTES[tensor.dtype]
    check_expansion(what, tensor.nbytes, tensor.span * width)
    if tensor.storage is None or tensor.storage.key not in saved.storages:
        raise CheckpointError(f"{what}: damaged: its data are not in the file; download or copy it again")
    held = saved.storages[tensor.storage.key].size
    if (tensor.offset + tensor.span) * width > held:
        raise CheckpointError(f"{what}: damaged: it reaches beyond the {held} bytes of its storage")
    data = saved.read(tensor.storage, tensor.offset * width, tensor.span * width)
    if saved.swapped:
        number = width // 2 if tensor.dtype.startswith("complex") else width
        data = data.view(f"u{number}").byteswap().view("u1")
    return data


def _dense(saved: Saved, tensor: SavedTensor, what: str) -> torch.Tensor:
    """Return a sparse tensor with its zeros."""
    import torch

    check_expansion(what, tensor.nbytes, sum(part.nbytes for part in tensor.parts))
    *indices, values = (part.view(_bytes(saved, part, what)) for part in tensor.parts)
    if tensor.layout == "sparse_coo":
        sparse = torch.sparse_coo_tensor(indices[0], values, tensor.shape, check_invariants=True)
    else:
        make: Any = torch.sparse_compressed_tensor
        layout = getattr(torch, tensor.layout)
        sparse = make(*indices, values, tensor.shape, layout=layout, check_invariants=True)
    dense: torch.Tensor = sparse.to_dense()
    return dense


def _is_tensor(value: object) -> bool:
    return isinstance(value, SavedTensor)
