"""Define the interface of checkpoint readers: a catalogue of tensors and lazy access to each.

A reader is opened once and then used from several threads. Opening reads headers
only; `Checkpoint.read` brings one tensor into memory at a time, so that memory does
not grow with the size of the checkpoint.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from esdtool.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from esdtool.checkpoint.stored_file import Place

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "bool": 1,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float4_e2m1fn_x2": 1,
    "qint8": 1,
    "quint8": 1,
    "qint32": 4,
    "quint4x2": 1,
    "quint2x4": 1,
}
"""Bytes of an element of torch's dtypes."""


@dataclass(frozen=True, kw_only=True)
class TrainedParameter:
    """A parameter of a live model."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One stored tensor, known from a header without reading its data."""

    name: str
    """Name in the file, e.g. `model.layers.0.self_attn.q_proj.weight`."""
    shape: tuple[int, ...]
    """Dimensions as stored."""
    dtype: str
    """Type of what `Checkpoint.read` gives, as torch spells it without the `torch.` prefix, e.g. `bfloat16`. It is the
    storage type too, unless the tensor is de-quantised."""
    file: str
    """File that holds the data, relative to the checkpoint; empty for tensors in memory."""
    quantization: str | None = None
    """How a de-quantised tensor is stored, in the format's own words, e.g. `gptq 4-bit`, `nf4`, `mxfp4`."""
    roundoff: float | None = None
    """Relative root-mean-square rounding error of the stored weights, where it is more than that of `dtype`."""
    rank: int | None = None
    """Largest possible rank of each matrix of a product of factors (LoRA); see `Checkpoint.factors`."""
    trained: tuple[TrainedParameter, ...] | None = None
    """The parameters that a trainer has in the place of a tensor that is computed from them (the g and v of weight
    normalisation). None: the tensor is itself a parameter. Empty: there is none that a decay could be given."""

    @property
    def storage(self) -> str:
        """How the values are stored, in one word or two."""
        return self.quantization or self.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data as stored."""
        return self.numel * DTYPE_BYTES.get(self.dtype, 4)


@dataclass(kw_only=True)
class Checkpoint(ABC):
    """A read-only, lazy view of a checkpoint's tensors."""

    location: str
    """What the user named: a path or a Hub id."""
    tensors: Mapping[str, TensorInfo]
    """Every stored tensor by name."""
    files: tuple[str, ...] = ()
    """The weight files in use, relative to the checkpoint, sorted."""
    revision: str | None = None
    """Commit of a Hub checkpoint, if known."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The model's `config.json` (for a directory that holds only an adapter: `adapter_config.json`); empty where
    there is none."""
    notes: tuple[str, ...] = ()
    """Remarks that the user should see, one line each (e.g. which of two formats was taken)."""
    adapter_config: Mapping[str, Any] = field(default_factory=dict)
    """PEFT's configuration of the adapter in a live model; empty elsewhere."""
    folder: Place | None = None
    """Where the files lie, for checkpoints that are files: what belongs to an adapter may be beside them."""
    collective_reads: bool = False
    """Whether all ranks must read the same tensors in the same order (a live model sharded over them)."""

    @property
    def model_type(self) -> str | None:
        """`model_type` of the configuration, e.g. `llama`."""
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    def info(self, name: str) -> TensorInfo:
        """Return the catalogue entry of one tensor.

        Raises:
            CheckpointError: if there is no tensor of that name; the message offers the nearest one.
        """
        try:
            return self.tensors[name]
        except KeyError:
            near = difflib.get_close_matches(name, self.tensors, n=1)
            hint = f"; the nearest name is {near[0]!r}" if near else ""
            raise CheckpointError(f"{self.location}: no tensor {name!r} among {len(self.tensors)}{hint}") from None

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Read one tensor in its storage dtype, on the CPU unless a live model has it elsewhere.

        Safe to call from several threads, unless `collective_reads`. The result may share memory with the checkpoint:
        do not write to it.

        Raises:
            CheckpointError: if the data cannot be read; the message names file and tensor.
        """

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return the positions `start` to `stop` of a tensor's first dimension; otherwise as `read`.

        Readers that can leave the rest of the tensor on disk do so.
        """
        return self.read(name)[start:stop]

    def stored_bytes(self, name: str) -> int:
        """Return about how many bytes are read for a tensor, which are fewer than its own where it is quantised."""
        return self.info(name).nbytes

    def fingerprint(self, name: str) -> str | None:
        """Return text that identifies the values of a tensor without reading them; None where nothing does.

        A remote store tells of each file an etag, a hash or the like. By default those of all files that were opened
        together stand for each tensor that is computed from them.
        """
        from esdtool.checkpoint.remote.path import RemotePath

        if not isinstance(self.folder, RemotePath):
            return None
        found = self.folder.store.fingerprint
        return None if found is None else f"{found} {name}"

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:  # noqa: ARG002 - for those that have them
        """Factors whose product is the tensor; None if it is stored as it is.

        Given for the tensors with `TensorInfo.rank`: their spectrum follows from the factors alone.

        Returns:
            (left [rows, rank], right [rank, columns]). Of a convolution, right is [rank, columns, *kernel]; of a stack
            of matrices, left is [stack, rows, rank] and right [stack, rank, columns].
        """
        return None


def tensor_info(name: str, tensor: torch.Tensor, label: str) -> TensorInfo:
    """Catalogue entry of a tensor in memory; `label` is the file it came from."""
    return TensorInfo(name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."), file=label)
