"""One `.onnx` file: the initialisers of its graph as tensors. Needs the extra `onnx`.

A graph has no modules, so names and orientation come from the nodes that use a tensor. ONNX multiplies from the right,
x W with W [in, out]; here every weight of a linear map is [out, in] as torch has it. External data is read by offset,
tensor by tensor; what lies inside the file (2 GB at most, protobuf's limit) is held in memory.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from esdtool.checkpoint.base import TensorInfo
from esdtool.checkpoint.heads import one_line, read_head
from esdtool.checkpoint.jsonfiles import leaves_folder
from esdtool.errors import CheckpointError, MissingExtraError

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

_ANONYMOUS = re.compile(
    r"onnx::.*|\d+|val_\d+|(.*/)?Constant(_\d+)?_output_\d+"  # torch
    r"|const_fold_opt__\d+|(.*/)?Const(_\d+)?(:\d+)?"  # tf2onnx
)
"""Names that exporters make up."""
_PASS_ON = frozenset({"Identity", "Cast", "Transpose", "DequantizeLinear"})
"""Nodes between a tensor and the node that uses it as a weight."""
_INTEGER_OPS = {"MatMulInteger": 1, "ConvInteger": 1, "QLinearMatMul": 3, "QLinearConv": 3, "MatMulNBits": 1}
"""Nodes that compute with codes, and which input holds the weight's."""

_Order = Literal["stored", "transposed"]


@dataclass(frozen=True, kw_only=True)
class _Data:
    """Elements of one tensor, in the file or beside it."""

    shape: tuple[int, ...]
    dtype: str
    numpy_type: str
    nbytes: int
    inline: bytes | None = None
    path: Path | None = None
    offset: int = 0

    def rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Positions `start` to `stop` of the first dimension, in the file's own numpy type; 4-bit codes unpacked."""
        each = self.nbytes // self.shape[0] if self.shape and self.shape[0] else 0
        packed = self.dtype.endswith("int4")
        first, count = (0, self.nbytes) if packed or not self.shape else (start * each, (stop - start) * each)
        if self.inline is not None:
            raw = np.frombuffer(self.inline, dtype=np.uint8, count=count, offset=first)
        else:
            assert self.path is not None
            raw = np.fromfile(self.path, dtype=np.uint8, count=count, offset=self.offset + first)
        if raw.size != count:
            raise EOFError
        if not packed:
            return np.array(raw).view(self.numpy_type).reshape((stop - start, *self.shape[1:]) if self.shape else ())
        codes = np.stack([raw & 15, raw >> 4], axis=-1).reshape(-1)[: math.prod(self.shape)].astype(np.int8)
        if self.dtype == "int4":
            codes = np.where(codes > 7, codes - 16, codes).astype(np.int8)
        return codes.reshape(self.shape)[start:stop] if self.shape else codes.reshape(())


@dataclass(frozen=True, kw_only=True)
class _Affine:
    """The scale, and zero point if any, of a DequantizeLinear node."""

    scale: _Data
    zero: _Data | None
    axis: int
    block: int


@dataclass(frozen=True, kw_only=True)
class _Use:
    """A node that uses a tensor as a weight."""

    op: str
    module: str | None
    """Dotted path that the node's name or its scope tells."""
    node: str
    order: _Order


@dataclass(kw_only=True)
class _Weight:
    """What is known of one tensor of the graph."""

    data: _Data
    uses: list[_Use] = field(default_factory=list)
    affine: _Affine | None = None
    codes: bool = False
    """Whether nodes compute with its integers as they are."""

    @property
    def order(self) -> _Order:
        """How to give it: as stored unless every use has it the other way round."""
        return "transposed" if self.uses and all(use.order == "transposed" for use in self.uses) else "stored"


class ONNXFile:
    """An ONNX model, known by its graph. External data is opened anew for each read."""

    def __init__(self, path: Path, label: str) -> None:
        """Read the graph of `path`; `label` is its name within the checkpoint.

        Raises:
            MissingExtraError: without the package `onnx`.
            CheckpointError: if the file is damaged or no ONNX model, or external data is missing or outside its folder.
        """
        self._path = path
        graphs = list(_graphs(_load(path).graph))
        weights, notes = _initialisers(path, graphs)
        _find_uses(graphs, weights)
        scales = _scales(graphs) & weights.keys()
        if scales:
            notes.append(f"{path}: left out the scales and zero points of quantised tensors: {len(scales)} in all")
        folder = label[: len(label) - len(path.name)]
        self._weights: dict[str, _Weight] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, weight in _named({name: weight for name, weight in weights.items() if name not in scales}).items():
            file = label if weight.data.path is None else folder + weight.data.path.relative_to(path.parent).as_posix()
            self._weights[name] = weight
            self.tensors[name] = _info(name, weight, file)
        codes = sum(weight.codes for weight in weights.values())
        if codes:
            notes.append(
                f"{path}: {codes} weight{'s' if codes > 1 else ''} of nodes that compute with integers "
                "(MatMulInteger, QLinearMatMul, MatMulNBits and the like): listed as codes and not scored"
            )
        self.notes: tuple[str, ...] = tuple(notes)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read one tensor, or some positions of its first dimension, turned to [out, in] where it is a linear map's."""
        weight, shape = self._weights[name], self.tensors[name].shape
        start, stop, _ = (rows or slice(None)).indices(shape[0]) if shape else (0, 1, 1)
        stop = max(start, stop)
        partly = weight.order == "stored" and weight.affine is None
        try:
            data = weight.data
            array = data.rows(start, stop) if partly else data.rows(0, data.shape[0] if data.shape else 1)
            array = array if weight.affine is None else _dequantised(array, data.dtype, weight.affine)
        except EOFError:
            raise CheckpointError(f"{weight.data.path}: tensor {name!r}: cannot read: the file is too short") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self._path}: tensor {name!r}: cannot read: {one_line(error)}") from error
        tensor = torch.from_numpy(array)
        if weight.affine is None and weight.data.dtype in _NUMPY_HAS_NO:
            tensor = tensor.view(getattr(torch, weight.data.dtype))
        if weight.order == "transposed":
            tensor = tensor.transpose(0, 1)
        return tensor if partly or rows is None else tensor[start:stop]


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


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and the graphs within its nodes (If, Loop, Scan)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _initialisers(path: Path, graphs: Iterable[Any]) -> tuple[dict[str, _Weight], list[str]]:
    """(tensors by their name in the graph, notes). The tensors of Constant nodes are initialisers by another name."""
    weights: dict[str, _Weight] = {}
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
                weights[name] = _Weight(data=_data(path, name, proto))
        sparse = [proto.values.name for proto in graph.sparse_initializer]
        if sparse:
            left_out.setdefault("stored as sparse", []).extend(sparse)
    notes = [
        f"{path}: left out {len(names)} tensor{'s' if len(names) > 1 else ''} {why}: "
        + ", ".join(names[:3])
        + (", ..." if len(names) > 3 else "")
        for why, names in left_out.items()
    ]
    return weights, notes


def _data(path: Path, name: str, proto: Any) -> _Data:
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
        return _Data(**common, path=file, offset=int(offset))
    inline = _inline(proto, dtype, numpy_type)
    if len(inline) != nbytes:
        raise CheckpointError(f"{path}: tensor {name!r}: damaged: {len(inline)} bytes of data, not {nbytes}")
    return _Data(**common, inline=inline)


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


def _find_uses(graphs: list[Any], weights: Mapping[str, _Weight]) -> None:
    """Note, for each tensor, the nodes that use it as a weight and how they look at it."""
    source: dict[str, tuple[str, bool]] = {name: (name, False) for name in weights}
    for graph in graphs:
        for node in graph.node:
            if node.op_type not in _PASS_ON or not node.input or node.input[0] not in source:
                continue
            name, turned = source[node.input[0]]
            if node.op_type == "Transpose":
                perm = tuple(_attribute(node, "perm", ()))
                if len(weights[name].data.shape) != 2 or perm not in ((), (1, 0), (0, 1)):
                    continue
                turned ^= perm != (0, 1)
            elif node.op_type == "DequantizeLinear":
                weights[name].affine = _affine(node, weights)
                if weights[name].affine is None:
                    continue
            source[node.output[0]] = (name, turned)
    for graph in graphs:
        for node in graph.node:
            _note_use(node, source, weights)
    for weight in weights.values():
        if weight.codes or not weight.uses:  # a bias, or no weight at all: the integers as they are
            weight.affine = None


def _scales(graphs: list[Any]) -> set[str]:
    """Names of what belongs to quantised tensors: a matrix of scales, one for each block, is no matrix of weights."""
    first = {"DequantizeLinear": 1, "MatMulNBits": 2}
    return {
        name
        for graph in graphs
        for node in graph.node
        if node.op_type in first
        for name in node.input[first[node.op_type] :]
    }


def _note_use(node: Any, source: Mapping[str, tuple[str, bool]], weights: Mapping[str, _Weight]) -> None:
    """Add one node to the uses of its weight."""
    inputs = list(node.input)
    if node.op_type in _INTEGER_OPS:
        position = _INTEGER_OPS[node.op_type]
        if position < len(inputs) and inputs[position] in source:
            weight = weights[source[inputs[position]][0]]
            weight.codes = True
            weight.uses.append(_use(node, "stored"))
        return
    positions: dict[int, _Order] = {}
    if node.op_type in ("MatMul", "FusedMatMul"):
        positions = {1: "transposed", 0: "stored"}
        if _attribute(node, "transB", 0):
            positions[1] = "stored"
    elif node.op_type in ("Gemm", "FusedGemm"):
        positions = {
            1: "stored" if _attribute(node, "transB", 0) else "transposed",
            0: "transposed" if _attribute(node, "transA", 0) else "stored",
        }
    elif node.op_type in ("Conv", "FusedConv"):
        positions = {1: "stored"}
    elif node.op_type == "ConvTranspose":  # with groups each has its own matrix: leave them
        positions = {1: "transposed" if _attribute(node, "group", 1) == 1 else "stored"}
    elif node.op_type == "Gather":
        positions = {0: "stored"}
    elif node.op_type == "Attention" and node.domain == "com.microsoft":
        positions = {1: "transposed"}
    linear = node.op_type not in ("Conv", "FusedConv", "ConvTranspose", "Gather")
    for position, order in positions.items():
        if position < len(inputs) and inputs[position] in source:
            name, turned = source[inputs[position]]
            if len(weights[name].data.shape) < 2 or (linear and len(weights[name].data.shape) != 2):
                continue  # vectors; stacks of matrices in batched products
            if turned:
                order = "stored" if order == "transposed" else "transposed"
            weights[name].uses.append(_use(node, order))


def _use(node: Any, order: _Order) -> _Use:
    return _Use(op=node.op_type, module=_module(node), node=node.name, order=order)


def _module(node: Any) -> str | None:
    """The module that a node stands for: `/encoder/layer.0/query/MatMul` is `encoder.layer.0.query`."""
    for item in node.metadata_props:
        if item.key == "pkg.torch.onnx.name_scopes":  # torch's newer exporter: the modules, then the node itself
            try:
                scopes = ast.literal_eval(item.value)
            except (ValueError, SyntaxError):
                break
            if isinstance(scopes, list) and len(scopes) > 1 and isinstance(scopes[-2], str) and scopes[-2]:
                return scopes[-2]
    segments = [segment for segment in node.name.split("/") if segment]
    operation = re.sub("^(Fused|QLinear)|(Integer|NBits)$", "", node.op_type)  # a quantiser keeps the node's name
    if segments and segments[-1].startswith(operation):
        segments.pop()
    elif len(segments) == 1:
        return None
    return ".".join(segments) or None


def _attribute(node: Any, name: str, default: Any) -> Any:
    """The value of an integer or list attribute."""
    for attribute in node.attribute:
        if attribute.name == name:
            return list(attribute.ints) if isinstance(default, tuple) else attribute.i
    return default


def _affine(node: Any, weights: Mapping[str, _Weight]) -> _Affine | None:
    """Scale and zero point of a DequantizeLinear node, if they are constant."""
    names = [name for name in node.input[1:] if name]
    if not names or any(name not in weights for name in names):
        return None
    scale, *zero = (weights[name].data for name in names)
    axis, block = int(_attribute(node, "axis", 1)), int(_attribute(node, "block_size", 0))
    return _Affine(scale=scale, zero=zero[0] if zero else None, axis=axis, block=block)


def _dequantised(codes: np.ndarray[Any, Any], dtype: str, affine: _Affine) -> np.ndarray[Any, Any]:
    """(codes - zero) * scale, float32: one scale for all, for each position along an axis, or for each block of it.

    Raises:
        ValueError: if the shapes do not fit.
    """

    def values(data: _Data) -> np.ndarray[Any, Any]:
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


def _named(weights: Mapping[str, _Weight]) -> dict[str, _Weight]:
    """The tensors under the names that they get: their own, or that of the module of the first node that uses them."""
    wanted: dict[str, str] = {}
    for name, weight in weights.items():
        new = name
        module = next((use.module for use in weight.uses if use.module), None)
        if _ANONYMOUS.fullmatch(name) and module is not None:
            new = f"{module}.weight"
        elif weight.uses:  # onnxruntime's model builder: `layers.0.attn.q_proj.MatMul.weight`
            new = name.replace(f".{weight.uses[0].op}.weight", ".weight")
            if len(weight.data.shape) > 2 and not weight.codes and not new.endswith(".weight"):
                new += ".weight"  # that it is a convolution's kernel is known here, and nowhere else
        wanted[name] = new
    taken = list(wanted.values())
    named: dict[str, _Weight] = {}
    for name, weight in weights.items():
        new = wanted[name]
        if taken.count(new) > 1 and new != name:  # several products in one module
            node = next((use.node for use in weight.uses if use.module), "").strip("/").replace("/", ".")
            new = f"{node}.weight" if node and f"{node}.weight" not in taken else name
        named[new if new not in named else name] = weight
    return named


def _info(name: str, weight: _Weight, file: str) -> TensorInfo:
    data = weight.data
    shape = (data.shape[1], data.shape[0], *data.shape[2:]) if weight.order == "transposed" else data.shape
    if weight.affine is not None:
        quantization, error = f"onnx {data.dtype}", _ROUNDOFF.get(data.dtype)
        return TensorInfo(name=name, shape=shape, dtype="float32", file=file, quantization=quantization, roundoff=error)
    dtype = {"uint4": "uint8", "int4": "int8"}.get(data.dtype, data.dtype)
    return TensorInfo(name=name, shape=shape, dtype=dtype, file=file)
