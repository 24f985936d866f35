"""Translate the names of Keras's datasets into torch's, and permute their axes accordingly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")
"""Groups of Keras 3 whose members are named after their class; the layer's own name is an attribute."""


_PROJECTIONS = {
    # Sublayers of MultiHeadAttention, by attribute in Keras 3 and by name in Keras 2
    "query_dense": "query",
    "key_dense": "key",
    "value_dense": "value",
    "output_dense": "attention_output",
}


_KERNEL_FIRST = ("kernel", "bias")
_LONGEST_EQUATION = 200


_VARIABLES: dict[str, tuple[str, ...]] = {
    "Dense": _KERNEL_FIRST,
    "EinsumDense": _KERNEL_FIRST,
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _KERNEL_FIRST),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _KERNEL_FIRST),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), ("depthwise_kernel", "bias")),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), ("depthwise_kernel", "pointwise_kernel", "bias")),
    "Embedding": ("embeddings",),
    **dict.fromkeys(("LSTMCell", "GRUCell", "SimpleRNNCell"), ("kernel", "recurrent_kernel", "bias")),
    **dict.fromkeys(("LSTM", "GRU", "SimpleRNN"), ("kernel", "recurrent_kernel", "bias")),
}
"""What the numbered variables of a layer are, by class."""


def _snake(name: str) -> str:
    """Keras's default name of a layer of a class: `Conv2DTranspose` is `conv2d_transpose`."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", name)).lower()


_CLASS_OF_DEFAULT_NAME = {_snake(name): name for name in _VARIABLES}


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One array of the file, from its header."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    names: tuple[str | None, ...]
    """The layers' own names, for each group on the path to the dataset."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A conversion from a dataset to a tensor: axes in this order, then this shape."""

    path: str
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    merged: bool = False
    """Whether the shape is another than that of the axes in order."""
    update_first: bool = False
    """Rows are the gates update, reset, new (Keras's GRU), and are given as reset, update, new (torch's)."""


def layer_settings(config: Any) -> dict[str, Mapping[str, Any]]:
    """The configuration of each layer, by name, anywhere in a model's configuration; a name of two classes is none."""
    try:
        tree = json.loads(config) if isinstance(config, str | bytes) else None
    except (ValueError, RecursionError):
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    ambiguous: set[str] = set()
    todo = [tree]
    while todo:
        item = todo.pop()
        todo += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        if not isinstance(item, dict) or not isinstance(item.get("class_name"), str):
            continue
        settings = item.get("config")
        name = settings.get("name") if isinstance(settings, dict) else None
        if isinstance(name, str):
            if name in found and found[name]["class_name"] != item["class_name"]:
                ambiguous.add(name)
            found[name] = item
    return {name: item for name, item in found.items() if name not in ambiguous}


def make_plans(
    datasets: list[Dataset], layers: Mapping[str, Mapping[str, Any]], *, legacy: bool
) -> tuple[dict[str, _Plan], list[str]]:
    """(what becomes of each dataset, by the tensor's name; the layers whose class is a guess)."""
    plans: dict[str, _Plan] = {}
    guessed: list[str] = []
    shapes = {dataset.path: dataset.shape for dataset in datasets}
    for dataset in datasets:
        module, leaf, names = _legacy_name(dataset) if legacy else _name(dataset)
        settings = layers.get(names[0], {}) if names else {}
        kind: str | None = settings.get("class_name") or next(filter(None, map(_default_class, names)), None)
        if kind in (None, "Dense") and module and module[-1] in _PROJECTIONS.values():
            group = dataset.path.rpartition("/")[0]
            if any(len(shapes.get(f"{group}/{kernel}", ())) == 3 for kernel in ("0", "kernel", "kernel:0")):
                kind = "EinsumDense"
        role = leaf
        if leaf.isdecimal():
            known = _VARIABLES.get(kind or "", ())
            role = known[int(leaf)] if int(leaf) < len(known) else f"vars.{leaf}"
            if not known:
                role = _guess(dataset, shapes) or role
        recurrent = (kind or "").removesuffix("Cell") in ("LSTM", "GRU", "SimpleRNN") or _has_recurrent(dataset, shapes)
        name, plan = _plan(dataset, module, role, kind, settings, recurrent=recurrent)
        if len(dataset.shape) > 1 and role == "kernel" and (kind not in _VARIABLES or name.endswith(".kernel")):
            guessed.append(".".join(module))
        plans[name if name not in plans else dataset.path.replace("/", ".")] = plan
    return plans, guessed


def _legacy_name(dataset: Dataset) -> tuple[list[str], str, list[str]]:
    """(module, leaf, names of the layer) of `[model_weights/]dense/dense/kernel:0`: a layer, then a weight's name."""
    segments = dataset.path.removeprefix("model_weights/").split("/")
    layer, weight = segments[0], segments[1:] or segments
    *module, leaf = weight if layer in weight else [layer, *weight]
    # Transformers' TensorFlow models write `layer_._0` for `layer.0`.
    module = [part for segment in module for part in segment.split("_._")]
    return module, leaf.partition(":")[0], module[-1:]


def _name(dataset: Dataset) -> tuple[list[str], str, list[str]]:
    """(module, leaf, names of the layer) of Keras 3's `layers/dense/vars/0`, or of any other path."""
    *groups, leaf = dataset.path.split("/")
    if groups[-1:] == ["vars"] and leaf.isdecimal():
        groups.pop()
    own = dataset.names[: len(groups)]
    module = []
    for depth, segment in enumerate(groups):
        contained = depth > 0 and groups[depth - 1] in _CONTAINERS
        if segment not in _CONTAINERS:
            module.append((own[depth] if contained else None) or _PROJECTIONS.get(segment, segment))
    # The cell of a recurrent layer has no class in its name where only the layer's group has one.
    names = [name for name in (own[-1] if own else None, *groups[: -3 if groups[-1:] == ["cell"] else -2 : -1]) if name]
    return module, leaf, names


def _default_class(name: str) -> str | None:
    """Return the class whose default name this is: `dense_3` is a Dense."""
    return _CLASS_OF_DEFAULT_NAME.get(name) or _CLASS_OF_DEFAULT_NAME.get(re.sub(r"_\d+$", "", name))


def _guess(dataset: Dataset, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Guess the role of a numbered variable in a layer of unknown class: a kernel, a recurrent kernel, or None."""
    number = dataset.path.rpartition("/")[2]
    if number == "0" and len(dataset.shape) >= 2:
        return "kernel"
    if number == "1" and _has_recurrent(dataset, shapes):
        return "recurrent_kernel"
    return None


def _has_recurrent(dataset: Dataset, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether a recurrent kernel [units, gates * units] lies beside a kernel [in, gates * units]."""
    group = dataset.path.rpartition("/")[0]
    suffix = ":0" if dataset.path.endswith(":0") else ""
    if f"{group}/recurrent_kernel{suffix}" in shapes:
        return True
    first, second = shapes.get(f"{group}/0", ()), shapes.get(f"{group}/1", ())
    if group.split("/")[-2:-1] != ["cell"] or len(first) != 2 or len(second) != 2:
        return False
    return first[1] == second[1] and second[0] > 0 and second[1] % second[0] == 0


def _plan(
    dataset: Dataset, module: list[str], role: str, kind: str | None, settings: Mapping[str, Any], *, recurrent: bool
) -> tuple[str, _Plan]:
    """(name, plan) of one dataset of which role and class are known, or not."""
    shape = dataset.shape
    rank = len(shape)
    layer = ".".join(module)
    kernel = tuple(range(rank - 2))

    def plan(axes: tuple[int, ...], leaf: str, merged: tuple[int, ...] | None = None) -> tuple[str, _Plan]:
        turned = merged or tuple(shape[axis] for axis in axes)
        gru = recurrent and leaf.startswith("weight_") and (kind or layer.rpartition(".")[2]).lower().startswith("gru")
        return ".".join(filter(None, (layer, leaf))), _Plan(
            path=dataset.path,
            axes=axes,
            shape=turned,
            merged=merged is not None,
            update_first=gru and turned[0] % 3 == 0,
        )

    if role == "recurrent_kernel" and rank == 2:
        return plan((1, 0), "weight_hh_l0")
    if role == "kernel" and rank == 2 and recurrent:
        return plan((1, 0), "weight_ih_l0")
    if role == "kernel" and (kind or "").startswith("Depthwise"):
        role = "depthwise_kernel"
    if role == "depthwise_kernel" and rank > 2:
        leaf = "depthwise.weight" if (kind or "").startswith("Separable") else "weight"
        sizes = tuple(shape[axis] for axis in kernel)
        return plan((rank - 2, rank - 1, *kernel), leaf, (shape[-2] * shape[-1], 1, *sizes))
    if role == "pointwise_kernel" and rank > 2:
        return plan((rank - 1, rank - 2, *kernel), "pointwise.weight")
    if role == "kernel" and rank == 2 and kind != "EinsumDense":
        return plan((1, 0), "weight")
    if role == "kernel" and kind == "EinsumDense":
        split = _einsum(settings, rank) or _projection(module[-1] if module else "", rank)
        if split is not None:
            outputs, inputs = split
            merged = (math.prod(shape[axis] for axis in outputs), math.prod(shape[axis] for axis in inputs))
            return plan((*outputs, *inputs), "weight", merged)
        if rank == 2:
            return plan((1, 0), "weight")
    if role == "kernel" and rank > 2 and (kind or "").endswith("DTranspose"):
        return plan((rank - 2, rank - 1, *kernel), "weight")
    if role == "kernel" and rank > 2 and ((kind or "").startswith("Conv") or (rank > 3 and kind is None)):
        return plan((rank - 1, rank - 2, *kernel), "weight")
    return plan(tuple(range(rank)), role)


def _einsum(settings: Mapping[str, Any], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(output axes, input axes) of an EinsumDense kernel from its equation, e.g. `abc,cde->abde`: (1, 2), (0,)."""
    config = settings.get("config")
    equation = config.get("equation") if isinstance(config, Mapping) else None
    match = (
        re.fullmatch(r"(.*),(\w+)->(.*)", equation.replace(" ", ""))
        if isinstance(equation, str) and len(equation) <= _LONGEST_EQUATION
        else None
    )
    if match is None or len(match[2]) != rank:
        return None
    outputs = tuple(axis for axis, letter in enumerate(match[2]) if letter in match[3])
    inputs = tuple(axis for axis, letter in enumerate(match[2]) if letter in match[1])
    # A letter on both sides is a batch of matrices, not one.
    return (outputs, inputs) if outputs and inputs and not set(outputs) & set(inputs) else None


def _projection(name: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the same for MultiHeadAttention's: [in, heads, width] of a query, [heads, width, out] of the output."""
    if rank != 3 or name not in _PROJECTIONS.values():
        return None
    return ((2,), (0, 1)) if name == "attention_output" else ((1, 2), (0,))
