"""Tensors as `torch.save` writes them, from the plain data of its pickle; torch's unpickler is not used.

A tensor is a call in the pickle: `_rebuild_tensor_v2(storage, offset, size, stride, ...)`, where the storage is a
reference to bytes outside of it. `make` turns such calls into a `SavedTensor`; all others stay inert records.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from esdtool.checkpoint.base import DTYPE_BYTES
from esdtool.checkpoint.formats.torch_save.plain_pickle import Instance, Persistent, PickleError, Symbol
from esdtool.checkpoint.limits import DIMENSIONS
from esdtool.checkpoint.raw_bytes import elements

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
_DTYPES = {Symbol("torch", name): name for name in DTYPE_BYTES}
_DTYPE_OF_STORAGE = {
    Symbol(module, name): dtype for name, dtype in _STORAGES.items() for module in ("torch", "torch.cuda")
}
_UNTYPED = Symbol("torch.storage", "UntypedStorage")
_SIZE = Symbol("torch", "Size")
_LAYOUT = Symbol("torch.serialization", "_get_layout")
_SPARSE_LAYOUTS = {f"torch.sparse_{kind}": f"sparse_{kind}" for kind in ("coo", "csr", "csc", "bsr", "bsc")}
_INERT = (
    "collections Counter", "_codecs encode", "builtins bytearray", "builtins set", "builtins complex",
    "__builtin__ bytearray", "__builtin__ set", "__builtin__ complex", "torch device", "torch Tensor",
    "torch.nn.parameter Parameter", "torch.nn.parameter Buffer", "torch.storage TypedStorage",
    "torch per_tensor_affine", "torch per_tensor_symmetric", "torch per_channel_affine",
    "torch per_channel_symmetric", "torch per_channel_affine_float_qparams", "torch contiguous_format",
)  # fmt: skip
"""What else `torch.load` admits. None of it holds weights, and no call of it is made."""


class TensorKind(Enum):
    """A tensor as it is saved."""

    DENSE = "dense"
    SPARSE = "sparse"
    META = "meta"
    """Without data."""
    QUANTIZED = "quantized"
    """With torch's own quantisation."""
    NESTED = "nested"
    """A list of tensors of different shapes under one name."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Storage:
    """Bytes outside of the pickle."""

    key: str
    dtype: str | None
    """None: bytes, and the tensor tells its own dtype."""
    nbytes: int
    """Value in the pickle."""
    offset: int = 0
    """Elements of the stored bytes to pass over (files of torch before 0.4)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavedTensor:
    """One tensor of a pickle. Its numbers have not been compared with the storage yet."""

    kind: TensorKind
    shape: tuple[int, ...] = ()
    dtype: str = ""
    stride: tuple[int, ...] = ()
    offset: int = 0
    """First element within the storage."""
    storage: Storage | None = None
    conjugated: bool = False
    negated: bool = False
    layout: str = ""
    """Layout of a sparse tensor, e.g. `sparse_coo`."""
    parts: tuple[SavedTensor, ...] = ()
    """Parts of a sparse tensor: indices and values, in the order of torch's constructors."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, each for itself."""
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def span(self) -> int:
        """Elements of the storage from its first to its last."""
        if self.numel == 0:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    def rows(self, start: int, stop: int) -> SavedTensor:
        """Return the positions `start` to `stop` of the first dimension of a dense tensor."""
        return SavedTensor(
            kind=self.kind,
            shape=(stop - start, *self.shape[1:]),
            dtype=self.dtype,
            stride=self.stride,
            offset=self.offset + start * self.stride[0],
            storage=self.storage,
            conjugated=self.conjugated,
            negated=self.negated,
        )

    def view(self, data: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Return the dense tensor in its span of bytes, in the machine's own order."""
        import torch

        tensor = elements(data, self.dtype).as_strided(self.shape, self.stride)
        tensor = tensor.conj() if self.conjugated else tensor
        tensor = torch._neg_view(tensor) if self.negated else tensor
        return tensor.resolve_conj().resolve_neg()


def admitted() -> frozenset[Symbol]:
    """Return the names that a pickle of `torch.save` may use: torch's own list, and the additions of this process."""
    import torch

    own = set()
    for entry in torch.serialization.get_safe_globals():
        value, name = entry if isinstance(entry, tuple) else (entry, None)
        module, _, leaf = (name or f"{value.__module__}.{value.__qualname__}").rpartition(".")
        own.add(Symbol(module, leaf))
    return _KNOWN | own


def make(symbol: Symbol, arguments: tuple[Any, ...]) -> Any:
    """Return the meaning of a call in the pickle: a tensor, or an inert record.

    Raises:
        PickleError: if a tensor's arguments are not such.
    """
    maker = _MAKERS.get(symbol)
    if maker is None:
        return Instance(symbol, arguments)
    try:
        return maker(*arguments)
    except TypeError as error:  # too few arguments, or too many
        raise PickleError(f"{symbol.name} with {len(arguments)} arguments") from error


def _dense(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> SavedTensor:
    """`_rebuild_tensor`, and version 2 with requires_grad, hooks and metadata."""
    found = _storage(storage)
    if found.dtype is None:
        raise PickleError("a tensor without a dtype")
    return _checked(found, offset, size, stride, found.dtype, rest[2] if len(rest) > 2 else None)


def _dense_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> SavedTensor:
    return _checked(_storage(storage), offset, size, stride, _dtype(dtype), metadata)


def _checked(storage: Storage, offset: Any, size: Any, stride: Any, dtype: str, metadata: Any) -> SavedTensor:
    shape, steps = _numbers(size), _numbers(stride)
    if len(shape) != len(steps) or not _is_count(offset):
        raise PickleError("a tensor whose shape and strides do not fit")
    flags = metadata if isinstance(metadata, dict) else {}
    kind = TensorKind.QUANTIZED if dtype.startswith(("qint", "quint")) else TensorKind.DENSE
    return SavedTensor(
        kind=kind,
        shape=shape,
        dtype=dtype,
        stride=steps,
        offset=offset + storage.offset,
        storage=storage,
        conjugated=flags.get("conj") is True,
        negated=flags.get("neg") is True,
    )


def _parameter(data: Any, *_: Any) -> SavedTensor:
    if not isinstance(data, SavedTensor):
        raise PickleError("a parameter without a tensor")
    return data


def _of_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    """`_rebuild_from_type_v2`: a tensor with attributes, or of a subclass."""
    if not isinstance(function, Symbol) or function not in _MAKERS or not isinstance(arguments, tuple):
        raise PickleError("a tensor that is made in an unknown way")
    if _MAKERS[function] is _of_type:
        raise PickleError("a tensor of a type of a type")
    return make(function, arguments)


def _meta(dtype: Any, size: Any, stride: Any, _grad: Any) -> SavedTensor:
    return SavedTensor(kind=TensorKind.META, shape=_numbers(size), dtype=_dtype(dtype), stride=_numbers(stride))


def _quantized(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> SavedTensor:
    return _dense(storage, offset, size, stride)


def _sparse(layout: Any, data: Any) -> SavedTensor:
    arguments = layout.arguments if isinstance(layout, Instance) and layout.symbol == _LAYOUT else ()
    name = _SPARSE_LAYOUTS.get(arguments[0]) if len(arguments) == 1 and isinstance(arguments[0], str) else None
    count = 2 if name == "sparse_coo" else 3
    if name is None or not isinstance(data, tuple) or len(data) < count + 1:
        raise PickleError("a sparse tensor of unknown layout")
    parts = data[:count]
    if not all(isinstance(part, SavedTensor) and part.kind is TensorKind.DENSE for part in parts):
        raise PickleError("a sparse tensor without its parts")
    return SavedTensor(
        kind=TensorKind.SPARSE, shape=_numbers(data[count]), dtype=parts[-1].dtype, layout=name, parts=parts
    )


def _nested(*_: Any) -> SavedTensor:
    return SavedTensor(kind=TensorKind.NESTED, dtype="nested")


_MAKERS: dict[Symbol, Callable[..., Any]] = {
    Symbol("torch._utils", "_rebuild_tensor"): _dense,
    Symbol("torch._utils", "_rebuild_tensor_v2"): _dense,
    Symbol("torch._utils", "_rebuild_tensor_v3"): _dense_of_dtype,
    Symbol("torch._utils", "_rebuild_parameter"): _parameter,
    Symbol("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    Symbol("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _parameter,
    Symbol("torch.nn.parameter", "Parameter"): _parameter,
    Symbol("torch.nn.parameter", "Buffer"): _parameter,
    Symbol("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    Symbol("torch._utils", "_rebuild_meta_tensor_no_storage"): _meta,
    Symbol("torch._utils", "_rebuild_qtensor"): _quantized,
    Symbol("torch._utils", "_rebuild_sparse_tensor"): _sparse,
    Symbol("torch._utils", "_rebuild_nested_tensor"): _nested,
}
_KNOWN = frozenset(
    {
        *_MAKERS,
        *_DTYPES,
        *_DTYPE_OF_STORAGE,
        _UNTYPED,
        _SIZE,
        _LAYOUT,
        Symbol("collections", "OrderedDict"),
        *(Symbol(*text.split()) for text in _INERT),
    }
)


def _storage(value: Any) -> Storage:
    """Return the storage that a persistent id names: ("storage", type, key, device, elements[, view])."""
    key = value.key if isinstance(value, Persistent) else None
    if not isinstance(key, tuple) or len(key) not in (5, 6) or key[0] != "storage" or not _is_count(key[4]):
        raise PickleError("a tensor without a storage")
    _, kind, name, _, count = key[:5]
    dtype = _DTYPE_OF_STORAGE.get(kind) if isinstance(kind, Symbol) else None
    if dtype is None and kind != _UNTYPED:
        raise PickleError("a storage of an unknown type")
    if not isinstance(name, str):
        raise PickleError("a storage whose key is no text")
    offset = 0
    if len(key) == 6 and key[5] is not None:
        view = key[5]
        if not isinstance(view, tuple) or len(view) != 3 or not _is_count(view[1]):
            raise PickleError("a damaged view of a storage")
        offset = view[1]
    width = 1 if dtype is None else DTYPE_BYTES[dtype]
    return Storage(key=name, dtype=dtype, nbytes=count * width, offset=offset)


def _dtype(value: Any) -> str:
    dtype = _DTYPES.get(value) if isinstance(value, Symbol) else None
    if dtype is None:
        raise PickleError("a tensor of an unknown dtype")
    return dtype


def _numbers(value: Any) -> tuple[int, ...]:
    """Return a shape or strides: a tuple, a list or a `torch.Size`."""
    if isinstance(value, Instance) and value.symbol == _SIZE and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple | list) or len(value) > DIMENSIONS or not all(map(_is_count, value)):
        raise PickleError("a shape or strides that are no list of a few numbers")
    return tuple(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**60
