"""One `.onnx` file: the initialisers of its graph as tensors. Needs the extra `onnx`.

A graph has no modules, so names and orientation come from the nodes that use a tensor. ONNX multiplies from the right,
x W with W [in, out]; here every weight of a linear map is [out, in] as torch has it. External data is read by offset,
tensor by tensor; what lies inside the file (2 GB at most, protobuf's limit) is held in memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esdtool.checkpoint.base import TensorInfo
from esdtool.checkpoint.formats.onnx_graph import ANONYMOUS, Affine, Data, Weight, all_graphs, find_uses, scale_names
from esdtool.checkpoint.formats.onnx_recurrent import find_recurrent
from esdtool.checkpoint.heads import read_head
from esdtool.checkpoint.jsonfiles import leaves_folder
from esdtool.errors import CheckpointError, MissingExtraError
from esdtool.support.words import counted, listed, one_line

_TYPES: dict[int, tuple[str, str, float]] = {
    1: ("float32", "<f4", 4),
    2: ("uint8", "u1", 1),
    3: ("int8", "i1", 1),
    4: ("uint16", "<u2", 2),
    5: ("int16", "<i2", 2),
    6: ("int32", "<i4", 4),
    7: ("int64", "<i8", 8),
    9: ("bool", "?", 1),
    10: ("float16", "<f2", 2),
    11: ("float64", "<f8", 8),
    12: ("uint32", "<u4", 4),
    13: ("uint64", "<u8", 8),
    14: ("complex64", "<c8", 8),
    15: ("complex128", "<c16", 16),
    16: ("bfloat16", "<i2", 2),
    17: ("float8_e4m3fn", "u1", 1),
    18: ("float8_e4m3fnuz", "u1", 1),
    19: ("float8_e5m2", "u1", 1),
    20: ("float8_e5m2fnuz", "u1", 1),
    21: ("uint4", "u1", 0.5),
    22: ("int4", "u1", 0.5),
}
"""Of `TensorProto.DataType`: torch's name, the numpy type of the bytes, and bytes of an element."""
_NUMPY_HAS_NO = frozenset({"bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"})

_ROUNDOFF = {
    # 1.2 * 2**-bits for Gaussian weights, as in `gguf_file.roundoff`; 0.6 units of the last place for floats.
    "int8": 0.0047,
    "uint8": 0.0047,
    "int4": 0.075,
    "uint4": 0.075,
    "float8_e4m3fn": 0.0375,
    "float8_e4m3fnuz": 0.0375,
    "float8_e5m2": 0.075,
    "float8_e5m2fnuz": 0.075,
}


class ONNXFile:
    """An ONNX model, known by its graph. External data is opened anew for each read."""

    def __init__(self, path: Path, label: str) -> None:
        """Read the graph of `path`; `label` is its name within the checkpoint.

        Raises:
            MissingExtraError: without the package `onnx`.
            CheckpointError: if the file is damaged or no ONNX model, or external data is missing or outside its folder.
        """
        self._path = path
        graphs = list(all_graphs(_load(path).graph))
        weights, notes = _initialisers(path, graphs)
        find_uses(graphs, weights)
        scales = scale_names(graphs) & weights.keys()
        if scales:
            notes.append(f"{path}: left out the scales and zero points of quantised tensors: {len(scales)} in all")
        self._weights: dict[str, Weight] = {}
        self.tensors: dict[str, TensorInfo] = {}
        recurrent = find_recurrent(graphs, weights)
        self._recurrent = recurrent.weights
        for name, part in recurrent.weights.items():
            self.tensors[name] = part.info(name, _file_of(part.weight, path, label))
        listed = {
            recurrent.renamed.get(name, name): weight
            for name, weight in weights.items()
            if name not in scales and name not in recurrent.hidden
        }
        for name, weight in _named(listed).items():
            self._weights[name] = weight
            self.tensors[name] = _info(name, weight, _file_of(weight, path, label))
        codes = sum(weight.codes for weight in weights.values())
        if codes:
            notes.append(
                f"{path}: {codes} weight{'s' if codes > 1 else ''} of nodes that compute with integers "
                "(MatMulInteger, QLinearMatMul, MatMulNBits and the like): listed as codes and not scored"
            )
        self.notes: tuple[str, ...] = tuple(notes)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read one tensor, or some positions of its first dimension, turned to [out, in] where it is a linear map's."""
        if name in self._recurrent:
            tensor = self._read_recurrent(name)
            return tensor if rows is None else tensor[rows]
        weight, shape = self._weights[name], self.tensors[name].shape
        start, stop, _ = (rows or slice(None)).indices(shape[0]) if shape else (0, 1, 1)
        stop = max(start, stop)
        partly = weight.order == "stored" and weight.affine is None
        tensor = torch.from_numpy(self._array(name, weight, (start, stop) if partly else None))
        if weight.affine is None and weight.data.dtype in _NUMPY_HAS_NO:
            tensor = tensor.view(getattr(torch, weight.data.dtype))
        if weight.order == "transposed":
            tensor = tensor.transpose(0, 1)
        return tensor if partly or rows is None else tensor[start:stop]

    def _read_recurrent(self, name: str) -> torch.Tensor:
        """One direction of a recurrent node's weight, with its gates in torch's order."""
        part = self._recurrent[name]
        stored = self._array(name, part.weight, None)[part.direction]
        try:
            tensor = torch.from_numpy(part.arranged(stored))
        except (EOFError, ValueError, IndexError) as error:  # scales that do not fit
            raise CheckpointError(f"{self._path}: tensor {name!r}: cannot read: {one_line(error)}") from error
        if part.weight.affine is None and part.weight.data.dtype in _NUMPY_HAS_NO:
            tensor = tensor.view(getattr(torch, part.weight.data.dtype))
        return tensor

    def _array(self, name: str, weight: Weight, rows: tuple[int, int] | None) -> np.ndarray[Any, Any]:
        """Some rows of a weight as they are stored, or the whole of it, de-quantised where a node does that.

        Raises:
            CheckpointError: if they cannot be read.
        """
        data = weight.data
        try:
            array = data.rows(*rows) if rows is not None else data.rows(0, data.shape[0] if data.shape else 1)
            return array if weight.affine is None else _dequantised(array, data.dtype, weight.affine)
        except EOFError:
            raise CheckpointError(f"{data.path}: tensor {name!r}: cannot read: the file is too short") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self._path}: tensor {name!r}: cannot read: {one_line(error)}") from error


def _file_of(weight: Weight, path: Path, label: str) -> str:
    """Name, within the checkpoint, of the file that holds a weight's elements."""
    if weight.data.path is None:
        return label
    return label[: len(label) - len(path.name)] + weight.data.path.relative_to(path.parent).as_posix()


def _load(path: Path) -> Any:
    """The model without its external data."""
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise MissingExtraError(f"{path}: reading an ONNX file", "onnx") from error
    read_head(path)
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    # protobuf meets arbitrary bytes here; its errors are of the types of whichever implementation is installed.
    except Exception as error:
        raise CheckpointError(
            f"{path}: not an ONNX file, or truncated: {one_line(error)}; download or copy it again"
        ) from error
    if not model.ir_version or not (model.graph.node or model.graph.initializer):
        raise CheckpointError(f"{path}: not an ONNX file: there is no graph in it")
    if model.functions:  # then nodes are calls, and what they do with a weight is told elsewhere
        model = onnx.inliner.inline_local_functions(model)
    return model


def _initialisers(path: Path, graphs: Iterable[Any]) -> tuple[dict[str, Weight], list[str]]:
    """(tensors by their name in the graph, notes). The tensors of Constant nodes are initialisers by another name."""
    weights: dict[str, Weight] = {}
    left_out: dict[str, list[str]] = {}
    for graph in graphs:
        protos = [(proto.name, proto) for proto in graph.initializer]
        for node in graph.node:
            if node.op_type == "Constant":
                protos += [(node.output[0], item.t) for item in node.attribute if item.name == "value" and item.t.dims]
        for name, proto in protos:
            if proto.data_type not in _TYPES:
                left_out.setdefault(f"of data type {proto.data_type}", []).append(name)
            elif name in weights:
                left_out.setdefault("of a name that another graph uses, too", []).append(name)
            else:
                weights[name] = Weight(data=_data(path, name, proto))
        sparse = [proto.values.name for proto in graph.sparse_initializer]
        if sparse:
            left_out.setdefault("stored as sparse", []).extend(sparse)
    notes = [
        f"{path}: left out {counted(len(names), 'tensor')} {why}: {listed(names)}" for why, names in left_out.items()
    ]
    return weights, notes


def _data(path: Path, name: str, proto: Any) -> Data:
    """Where the elements of a `TensorProto` are."""
    dtype, numpy_type, size = _TYPES[proto.data_type]
    shape = tuple(proto.dims)
    nbytes = math.ceil(math.prod(shape) * size)
    common = {"shape": shape, "dtype": dtype, "numpy_type": numpy_type, "nbytes": nbytes}
    if proto.data_location == 1:
        entries = {entry.key: entry.value for entry in proto.external_data}
        location, offset = entries.get("location", ""), entries.get("offset", "0")
        length = entries.get("length", str(nbytes))
        if not location or leaves_folder(location):
            raise CheckpointError(
                f"{path}: tensor {name!r}: refused: its data in {location!r} lies outside the model's folder"
            )
        file = path.parent / location
        if not (offset.isdecimal() and length.isdecimal()) or int(length) < nbytes:
            raise CheckpointError(f"{path}: tensor {name!r}: damaged: offset {offset!r}, length {length!r} of its data")
        if not file.is_file():
            raise CheckpointError(f"{path}: its external data {location} is missing; copy it beside the model")
        if int(offset) + nbytes > (held := file.stat().st_size):
            raise CheckpointError(
                f"{file}: truncated: tensor {name!r} ends at byte {int(offset) + nbytes} but the file has {held}; "
                "download or copy it again"
            )
        return Data(**common, path=file, offset=int(offset))
    inline = _inline(proto, dtype, numpy_type)
    if len(inline) != nbytes:
        raise CheckpointError(f"{path}: tensor {name!r}: damaged: {len(inline)} bytes of data, not {nbytes}")
    return Data(**common, inline=inline)


def _inline(proto: Any, dtype: str, numpy_type: str) -> bytes:
    """Bytes of a tensor inside the file: raw, or in the typed field of older exporters."""
    if proto.HasField("raw_data"):
        return bytes(proto.raw_data)
    if proto.float_data:  # complex64, too: real and imaginary parts in turn
        return np.asarray(proto.float_data, dtype="<f4").tobytes()
    if proto.double_data:
        return np.asarray(proto.double_data, dtype="<f8").tobytes()
    if proto.int64_data:
        return np.asarray(proto.int64_data, dtype="<i8").tobytes()
    if proto.uint64_data:
        return np.asarray(proto.uint64_data, dtype=np.dtype("<u8")).astype(numpy_type).tobytes()
    # Everything of 32 bits and less; floats by their bit patterns.
    bits = numpy_type if dtype != "float16" else "<u2"
    return np.asarray(proto.int32_data, dtype=np.int64).astype(bits).tobytes()


def _dequantised(codes: np.ndarray[Any, Any], dtype: str, affine: Affine) -> np.ndarray[Any, Any]:
    """(codes - zero) * scale, float32: one scale for all, for each position along an axis, or for each block of it.

    Raises:
        ValueError: if the shapes do not fit.
    """

    def values(data: Data) -> np.ndarray[Any, Any]:
        array = _as_float32(data.rows(0, data.shape[0] if data.shape else 1), data.dtype)
        if array.size == 1:
            return array.reshape(())
        if affine.block:
            longer = array.repeat(affine.block, axis=affine.axis)
            return longer.take(np.arange(codes.shape[affine.axis]), axis=affine.axis)
        return array.reshape([-1 if axis == affine.axis % codes.ndim else 1 for axis in range(codes.ndim)])

    result = _as_float32(codes, dtype)
    if affine.zero is not None:
        result = result - values(affine.zero)
    return np.ascontiguousarray(result * values(affine.scale), dtype=np.float32)


def _as_float32(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    if dtype in _NUMPY_HAS_NO:
        values: np.ndarray[Any, Any] = torch.from_numpy(array).view(getattr(torch, dtype)).float().numpy()
        return values
    return array.astype(np.float32)


def _named(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The tensors under the names that they get: their own, or that of the module of the first node that uses them."""
    wanted: dict[str, str] = {}
    for name, weight in weights.items():
        new = name
        module = next((use.module for use in weight.uses if use.module), None)
        if ANONYMOUS.fullmatch(name) and module is not None:
            new = f"{module}.weight"
        elif weight.uses:  # onnxruntime's model builder: `layers.0.attn.q_proj.MatMul.weight`
            new = name.replace(f".{weight.uses[0].op}.weight", ".weight")
            if len(weight.data.shape) > 2 and not weight.codes and not new.endswith(".weight"):
                new += ".weight"  # that it is a convolution's kernel is known here, and nowhere else
        wanted[name] = new
    taken = Counter(wanted.values())
    named: dict[str, Weight] = {}
    for name, weight in weights.items():
        new = wanted[name]
        if taken[new] > 1 and new != name:  # several products in one module
            node = next((use.node for use in weight.uses if use.module), "").strip("/").replace("/", ".")
            new = f"{node}.weight" if node and f"{node}.weight" not in taken else name
        named[new if new not in named else name] = weight
    return named


def _info(name: str, weight: Weight, file: str) -> TensorInfo:
    data = weight.data
    shape = (data.shape[1], data.shape[0], *data.shape[2:]) if weight.order == "transposed" else data.shape
    if weight.affine is not None:
        quantization, error = f"onnx {data.dtype}", _ROUNDOFF.get(data.dtype)
        return TensorInfo(name=name, shape=shape, dtype="float32", file=file, quantization=quantization, roundoff=error)
    dtype = {"uint4": "uint8", "int4": "int8"}.get(data.dtype, data.dtype)
    return TensorInfo(name=name, shape=shape, dtype=dtype, file=file)
