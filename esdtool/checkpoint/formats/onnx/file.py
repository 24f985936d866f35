"""One `.onnx` file: the initialisers of its graph as tensors. Needs the extra `onnx`.

A graph has no modules, so names and orientation come from the nodes that use a tensor. ONNX multiplies from the right,
x W with W [in, out]; here every weight of a linear map is [out, in] as torch has it. External data is read by offset,
tensor by tensor; what lies inside the file (2 GB at most, protobuf's limit) is held in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from esdtool.checkpoint.base import TensorInfo
from esdtool.checkpoint.container import WeightFile
from esdtool.checkpoint.formats.onnx.data import TYPES, OnnxData, data_of
from esdtool.checkpoint.formats.onnx.graph import (
    ANONYMOUS,
    Affine,
    Weight,
    all_graphs,
    check_growth,
    find_uses,
    scale_names,
)
from esdtool.checkpoint.formats.onnx.recurrent import find_recurrent
from esdtool.checkpoint.limits import PROTOBUF_BYTES
from esdtool.checkpoint.stored_file import StoredFile
from esdtool.errors import CheckpointError, MissingExtraError
from esdtool.support.words import counted, listed, one_line

_ROUNDOFF = {
    # 1.2 * 2**-bits for Gaussian weights, as in `gguf.file.roundoff`; 0.6 units of the last place for floats.
    "int8": 0.0047,
    "uint8": 0.0047,
    "int4": 0.075,
    "uint4": 0.075,
    "float8_e4m3fn": 0.0375,
    "float8_e4m3fnuz": 0.0375,
    "float8_e5m2": 0.075,
    "float8_e5m2fnuz": 0.075,
}


class ONNXFile(WeightFile):
    """An ONNX model, known by its graph. External data is opened for each read."""

    def __init__(self, file: StoredFile, label: str) -> None:
        """Read the graph of a file; `label` is its name within the checkpoint.

        Raises:
            MissingExtraError: without the package `onnx`.
            CheckpointError: if the file is damaged or no ONNX model, or external data is missing or outside its folder.
        """
        path = file.path
        graphs = all_graphs(_load(file).graph)
        weights, notes = _initialisers(file, graphs)
        find_uses(graphs, weights)
        scales = scale_names(graphs) & weights.keys()
        if scales:
            notes.append(f"{path}: left out the scales and zero points of quantised tensors: {len(scales)} in all")
        folder = label[: len(label) - len(path.name)]

        def file_of(weight: Weight) -> str:
            return label if weight.data.location is None else folder + weight.data.location

        recurrent = find_recurrent(graphs, weights)
        self._recurrent = recurrent.weights
        others = weights.keys() - scales - recurrent.hidden
        self._weights = _named(
            {recurrent.renamed.get(name, name): weight for name, weight in weights.items() if name in others}
        )
        self.tensors = {name: part.info(name, file_of(part.weight)) for name, part in recurrent.weights.items()} | {
            name: _info(name, weight, file_of(weight)) for name, weight in self._weights.items()
        }
        codes = sum(weight.codes for weight in weights.values())
        if codes:
            notes.append(
                f"{path}: {counted(codes, 'weight')} of nodes that compute with integers "
                "(MatMulInteger, QLinearMatMul, MatMulNBits and the like): listed as codes and not scored"
            )
        self.notes = tuple(notes)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read one tensor, or some positions of its first dimension, turned to [out, in] where it is a linear map's."""
        if name in self._recurrent:
            part = self._recurrent[name]
            whole = part.weight.data.whole()
            if part.weight.affine is not None:
                whole = _dequantised(whole, part.weight.affine)
            tensor = part.arranged(whole[part.direction])
            return tensor if rows is None else tensor[rows]
        weight, shape = self._weights[name], self.tensors[name].shape
        start, stop, _ = (rows or slice(None)).indices(shape[0]) if shape else (0, 1, 1)
        stop = max(start, stop)
        data = weight.data
        partly = weight.order == "stored" and weight.affine is None
        tensor = data.rows(start, stop) if partly else data.whole()
        if weight.affine is not None:
            tensor = _dequantised(tensor, weight.affine)
        if weight.order == "transposed":
            tensor = tensor.transpose(0, 1)
        return tensor if partly or rows is None else tensor[start:stop]


def _load(file: StoredFile) -> Any:
    """Return the model without its external data."""
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise MissingExtraError(f"{file.path}: reading an ONNX file", "onnx") from error
    _ = file.head
    model = onnx.ModelProto()
    try:
        model.ParseFromString(file.read_all(PROTOBUF_BYTES))
    except CheckpointError:
        raise
    # protobuf meets arbitrary bytes here; its errors are of the types of whichever implementation is installed.
    except Exception as error:
        raise CheckpointError(
            f"{file.path}: not an ONNX file, or truncated: {one_line(error)}; download or copy it again"
        ) from error
    if not model.ir_version or not (model.graph.node or model.graph.initializer):
        raise CheckpointError(f"{file.path}: not an ONNX file: there is no graph in it")
    if model.functions:  # then nodes are calls, and what they do with a weight is told elsewhere
        check_growth(model)
        model = onnx.inliner.inline_local_functions(model)
    return model


def _initialisers(file: StoredFile, graphs: Iterable[Any]) -> tuple[dict[str, Weight], list[str]]:
    """(tensors by their name in the graph, notes). The tensors of Constant nodes are initialisers by another name."""
    weights: dict[str, Weight] = {}
    left_out: dict[str, list[str]] = {}
    for graph in graphs:
        protos = [(proto.name, proto) for proto in graph.initializer]
        for node in graph.node:
            if node.op_type == "Constant" and node.output:
                protos += [(node.output[0], item.t) for item in node.attribute if item.name == "value" and item.t.dims]
        for name, proto in protos:
            if proto.data_type not in TYPES:
                left_out.setdefault(f"of data type {proto.data_type}", []).append(name)
            elif name in weights:
                left_out.setdefault("of a name that another graph uses, too", []).append(name)
            else:
                weights[name] = Weight(data=data_of(file, name, proto))
        sparse = [proto.values.name for proto in graph.sparse_initializer]
        if sparse:
            left_out.setdefault("stored as sparse", []).extend(sparse)
    notes = [
        f"{file.path}: left out {counted(len(names), 'tensor')} {why}: {listed(names)}"
        for why, names in left_out.items()
    ]
    return weights, notes


def _dequantised(codes: torch.Tensor, affine: Affine) -> torch.Tensor:
    """(codes - zero) * scale, float32: one scale for all, for each position along an axis, or for each block of it."""
    length = codes.shape[affine.axis] if codes.ndim else 1

    def values(data: OnnxData) -> torch.Tensor:
        scales = data.whole().float()
        if scales.numel() == 1:
            return scales.reshape(())
        if affine.block:
            return scales.repeat_interleave(min(affine.block, length), dim=affine.axis).narrow(affine.axis, 0, length)
        return scales.reshape([-1 if axis == affine.axis % codes.ndim else 1 for axis in range(codes.ndim)])

    result = codes.float()
    if affine.zero is not None:
        result = result - values(affine.zero)
    return result * values(affine.scale)


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
