"""The weights of ONNX's recurrent nodes under torch's names: `weight_ih_l0`, `weight_hh_l0`, and their reverse.

A node LSTM, GRU or RNN keeps W [directions, gates * hidden, in] and R [directions, gates * hidden, hidden], with the
gates in an order of its own. onnxruntime's DynamicQuantizeLSTM keeps integers [directions, in, gates * hidden] with
scales and zero points. Each direction is one tensor here, with the gates in the order that torch has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esdtool.checkpoint.base import TensorInfo
from esdtool.checkpoint.formats.onnx.data import OnnxData
from esdtool.checkpoint.formats.onnx.graph import Weight, module_of

if TYPE_CHECKING:
    import torch

_ORDER = {
    "LSTM": (0, 2, 3, 1),  # input, output, forget, cell: torch has input, forget, cell, output
    "GRU": (1, 0, 2),  # update, reset, new: torch has reset, update, new
    "RNN": (0,),
    "DynamicQuantizeLSTM": (0, 2, 3, 1),
}
"""Where torch's gates are among a node's."""
_PASS_ON = frozenset({"Identity", "Cast", "DequantizeLinear"})
_BIAS, _PEEPHOLES = 3, 7
_QUANTIZED = {1: (8, 9), 2: (10, 11)}
"""Inputs with the scale and the zero point of W and of R."""
_REVERSE = b"reverse"


@dataclass(frozen=True, kw_only=True)
class RecurrentWeight:
    """One direction's W or R."""

    weight: Weight
    direction: int
    order: tuple[int, ...]
    """Position of each gate among the stored ones."""
    transposed: bool
    """Whether it is stored [in, gates * hidden]."""
    scale: OnnxData | None = None
    zero: OnnxData | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape [gates * hidden, in]."""
        _, first, second = self.weight.data.shape
        return (second, first) if self.transposed else (first, second)

    def info(self, name: str, file: str) -> TensorInfo:
        """Catalogue entry."""
        dtype = self.weight.data.dtype
        if self.scale is None and self.weight.affine is None:
            return TensorInfo(name=name, shape=self.shape, dtype=dtype, file=file)
        return TensorInfo(name=name, shape=self.shape, dtype="float32", file=file, quantization=f"onnx {dtype}")

    def arranged(self, stored: torch.Tensor) -> torch.Tensor:
        """Turn one direction as it is stored into torch's weight: de-quantised, turned, its gates in torch's order.

        Raises:
            ValueError: if scales do not fit.
        """
        one = stored
        if self.scale is not None:
            zero = 0.0 if self.zero is None else self._of_direction(self.zero, one.shape[1])
            one = (one.float() - zero) * self._of_direction(self.scale, one.shape[1])
        one = one.mT if self.transposed else one
        gates = one.unflatten(0, (len(self.order), -1))
        ordered: torch.Tensor = gates[list(self.order)].flatten(0, 1)
        return ordered

    def _of_direction(self, data: OnnxData, columns: int) -> torch.Tensor:
        """Return a scale or zero point: one for the direction, or one for each column of the stored matrix."""
        values = data.whole().float()
        if values.ndim:
            values = values[self.direction if values.shape[0] > 1 else 0]
        if values.numel() not in (1, columns):
            raise ValueError(f"{values.numel()} scales for {columns} columns")
        return values.flatten()


@dataclass(frozen=True, kw_only=True)
class Recurrent:
    """The weights of the recurrent nodes of a graph."""

    weights: Mapping[str, RecurrentWeight]
    """By torch's name."""
    renamed: Mapping[str, str]
    """New name, by the name in the graph, of biases and peepholes."""
    hidden: frozenset[str]
    """Names in the graph of tensors that are listed as others, or are scales of them."""


def find_recurrent(graphs: Iterable[Any], weights: Mapping[str, Weight]) -> Recurrent:
    """Find the weights of recurrent nodes; nodes whose weights are computed, or of an odd shape, are left alone."""
    found: dict[str, RecurrentWeight] = {}
    renamed: dict[str, str] = {}
    hidden: set[str] = set()
    layers: Counter[str] = Counter()
    for graph in graphs:
        source = _sources(graph, weights)
        for node in graph.node:
            if node.op_type not in _ORDER:
                continue
            inputs = [source.get(name, "") for name in node.input]
            module = module_of(node) or node.name.strip("/").replace("/", ".") or node.op_type.lower()
            layer = layers[module]
            parts = _parts(node, inputs, weights)
            if not parts or any(f"{module}.{name}_l{layer}{end}" in found for name, end, _ in parts):
                continue
            layers[module] += 1
            found |= {f"{module}.{name}_l{layer}{end}": part for name, end, part in parts}
            hidden |= {name for name in inputs[1:3] if name}
            if node.op_type == "DynamicQuantizeLSTM":
                hidden |= {name for name in inputs[8:12] if name}
            for position, name in ((_BIAS, "bias"), (_PEEPHOLES, "bias_peephole")):
                if position < len(inputs) and inputs[position]:
                    renamed[inputs[position]] = f"{module}.{name}_l{layer}"
    return Recurrent(weights=found, renamed=renamed, hidden=frozenset(hidden))


def _sources(graph: Any, weights: Mapping[str, Weight]) -> dict[str, str]:
    """Return the stored tensor behind each name, through nodes that pass it on."""
    source = {name: name for name in weights}
    for node in graph.node:
        if node.op_type in _PASS_ON and node.input and node.input[0] in source and node.output:
            source[node.output[0]] = source[node.input[0]]
    return source


def _parts(node: Any, inputs: list[str], weights: Mapping[str, Weight]) -> list[tuple[str, str, RecurrentWeight]]:
    """(name, ending of the direction, weight) of each W and R; none unless both are stored and fit."""
    order = _ORDER[node.op_type]
    quantized = node.op_type == "DynamicQuantizeLSTM"
    reverse = any(item.name == "direction" and item.s == _REVERSE for item in node.attribute)
    parts: list[tuple[str, str, RecurrentWeight]] = []
    for position, name in ((1, "weight_ih"), (2, "weight_hh")):
        weight = weights.get(inputs[position]) if position < len(inputs) else None
        if weight is None or len(weight.data.shape) != 3 or weight.data.shape[0] not in (1, 2):
            return []
        rows = weight.data.shape[2 if quantized else 1]
        if rows % len(order) or weight.data.dtype.endswith("int4"):
            return []
        scale = zero = None
        if quantized:
            held = [weights.get(inputs[place]) if place < len(inputs) else None for place in _QUANTIZED[position]]
            scale, zero = (None if item is None else item.data for item in held)
            if scale is None:
                return []
        for direction in range(weight.data.shape[0]):
            end = "_reverse" if reverse or direction else ""
            part = RecurrentWeight(
                weight=weight, direction=direction, order=order, transposed=quantized, scale=scale, zero=zero
            )
            parts.append((name, end, part))
    return parts
