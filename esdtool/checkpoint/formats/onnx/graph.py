"""Find the use of the initialisers of an ONNX graph: which are weights, in which orientation, and of which module."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from esdtool.checkpoint.formats.onnx.data import OnnxData
from esdtool.checkpoint.limits import NODES

ANONYMOUS = re.compile(
    r"onnx::.*|\d+|val_\d+|(.*/)?Constant(_\d+)?_output_\d+"  # torch
    r"|const_fold_opt__\d+|(.*/)?Const(_\d+)?(:\d+)?"  # tf2onnx
)
"""Names that exporters make up."""

_PASS_ON = frozenset({"Identity", "Cast", "Transpose", "DequantizeLinear"})
"""Nodes between a tensor and the node that uses it as a weight."""

_INTEGER_OPS = {"MatMulInteger": 1, "ConvInteger": 1, "QLinearMatMul": 3, "QLinearConv": 3, "MatMulNBits": 1}
"""Nodes that compute with codes, and which input holds the weight's."""

_LONGEST_SCOPES = 4096
"""Characters of an attribute with the modules of a node; longer ones are not looked at."""

_Order = Literal["stored", "transposed"]


@dataclass(frozen=True, kw_only=True)
class Affine:
    """The scale, and zero point if any, of a DequantizeLinear node."""

    scale: OnnxData
    zero: OnnxData | None
    axis: int
    block: int

    def fits(self, codes: tuple[int, ...]) -> bool:
        """Return whether scale and zero point have as many elements as codes of a shape have blocks, or one."""
        return all(self._fits(part.shape, codes) for part in (self.scale, self.zero) if part is not None)

    def _fits(self, scale: tuple[int, ...], codes: tuple[int, ...]) -> bool:
        if math.prod(scale) == 1:
            return True
        if not -len(codes) <= self.axis < len(codes):
            return False
        axis = self.axis % len(codes)
        if not self.block:
            return scale == (codes[axis],)
        blocks = -(-codes[axis] // self.block) if self.block > 0 else 0
        return scale == (*codes[:axis], blocks, *codes[axis + 1 :])


@dataclass(frozen=True, kw_only=True)
class _Use:
    """A node that uses a tensor as a weight."""

    op: str
    module: str | None
    """Dotted path that the node's name or its scope tells."""
    node: str
    order: _Order


@dataclass(kw_only=True)
class Weight:
    """The facts about one tensor of the graph."""

    data: OnnxData
    uses: list[_Use] = field(default_factory=list)
    affine: Affine | None = None
    codes: bool = False
    """Whether nodes compute with its integers as they are."""

    @property
    def order(self) -> _Order:
        """How to give it: as stored unless every use has it the other way round."""
        return "transposed" if self.uses and all(use.order == "transposed" for use in self.uses) else "stored"


def all_graphs(graph: Any) -> list[Any]:
    """Return a graph and the graphs within its nodes (If, Loop, Scan), each before those within it.

    Raises:
        ValueError: if there are more nodes and initialisers than any model has.
    """
    found, todo, size = [], [graph], 0
    while todo:
        found.append(inner := todo.pop())
        size += len(inner.node) + len(inner.initializer)
        if size > NODES:
            raise ValueError(f"more than {NODES} nodes and initialisers")
        below = [
            other
            for node in inner.node
            for attribute in node.attribute
            for other in ([attribute.g] if attribute.HasField("g") else attribute.graphs)
        ]
        todo += reversed(below)
    return found


def check_growth(model: Any) -> None:
    """Refuse functions that call themselves, or become too many nodes once they are inlined.

    Raises:
        ValueError: if they do.
    """
    bodies = {(function.domain, function.name, function.overload): function.node for function in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}
    # Depth first, without recursion: a function's size follows from those of what it calls.
    todo = [(key, False) for key in bodies]
    open_calls: set[tuple[str, str, str]] = set()
    while todo:
        key, is_done = todo.pop()
        calls = [call for node in _nodes(bodies[key]) if (call := _call(node)) in bodies]
        if is_done:
            open_calls.discard(key)
            sizes[key] = sum(1 for _ in _nodes(bodies[key])) + sum(sizes[call] for call in calls)
            if sizes[key] > NODES:
                raise ValueError(f"its functions are more than {NODES} nodes once they are inlined")
        elif key not in sizes:
            open_calls.add(key)
            todo.append((key, True))
            if any(call in open_calls for call in calls):
                raise ValueError("a function calls itself")
            todo += [(call, False) for call in set(calls) if call not in sizes]
    if sum(sizes.get(_call(node), 1) for node in _nodes(model.graph.node)) > NODES:
        raise ValueError(f"it is more than {NODES} nodes once its functions are inlined")


def _call(node: Any) -> tuple[str, str, str]:
    """Return the function that a node may call."""
    return node.domain, node.op_type, node.overload


def _nodes(nodes: Any) -> Iterator[Any]:
    """Nodes and those in the graphs within them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _nodes(inner.node)


def find_uses(graphs: list[Any], weights: Mapping[str, Weight]) -> None:
    """Note, for each tensor, the nodes that use it as a weight and how they look at it."""
    source: dict[str, tuple[str, bool]] = {name: (name, False) for name in weights}
    for graph in graphs:
        for node in graph.node:
            if node.op_type not in _PASS_ON or not node.input or not node.output or node.input[0] not in source:
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


def scale_names(graphs: list[Any]) -> set[str]:
    """Names of what belongs to quantised tensors: a matrix of scales, one for each block, is no matrix of weights."""
    first = {"DequantizeLinear": 1, "MatMulNBits": 2}
    return {
        name
        for graph in graphs
        for node in graph.node
        if node.op_type in first
        for name in node.input[first[node.op_type] :]
    }


def _note_use(node: Any, source: Mapping[str, tuple[str, bool]], weights: Mapping[str, Weight]) -> None:
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
    elif node.op_type in ("LSTM", "GRU", "RNN"):  # see the module `recurrent`
        positions = {1: "stored", 2: "stored"}
    linear = node.op_type not in ("Conv", "FusedConv", "ConvTranspose", "Gather", "LSTM", "GRU", "RNN")
    for position, order in positions.items():
        if position < len(inputs) and inputs[position] in source:
            name, turned = source[inputs[position]]
            if len(weights[name].data.shape) < 2 or (linear and len(weights[name].data.shape) != 2):
                continue  # vectors; stacks of matrices in batched products
            if turned:
                order = "stored" if order == "transposed" else "transposed"
            weights[name].uses.append(_use(node, order))


def _use(node: Any, order: _Order) -> _Use:
    return _Use(op=node.op_type, module=module_of(node), node=node.name, order=order)


def module_of(node: Any) -> str | None:
    """Return the module that a node stands for: `/encoder/layer.0/query/MatMul` is `encoder.layer.0.query`."""
    for item in node.metadata_props:
        if item.key == "pkg.torch.onnx.name_scopes":  # torch's newer exporter: the modules, then the node itself
            try:
                scopes = ast.literal_eval(item.value) if len(item.value) <= _LONGEST_SCOPES else None
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
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
    """Return the value of an integer or list attribute."""
    for attribute in node.attribute:
        if attribute.name == name:
            return list(attribute.ints) if isinstance(default, tuple) else attribute.i
    return default


def _affine(node: Any, weights: Mapping[str, Weight]) -> Affine | None:
    """Scale and zero point of a DequantizeLinear node, if they are constant."""
    names = [name for name in node.input[1:3] if name]
    if not names or any(name not in weights for name in (*names, node.input[0])):
        return None
    codes, scale, *zero = (weights[name].data for name in (node.input[0], *names))
    axis, block = int(_attribute(node, "axis", 1)), int(_attribute(node, "block_size", 0))
    affine = Affine(scale=scale, zero=zero[0] if zero else None, axis=axis, block=block)
    return affine if affine.fits(codes.shape) else None
