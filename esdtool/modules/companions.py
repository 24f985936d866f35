"""Tensors that belong to another one, told by structure: the same place in the model and shapes that fit.

Names differ between libraries; what a companion is for does not. Scales and offsets lie beside the codes that they
belong to, a moving average repeats the names of the weights, and a codebook lies beside the counts of its entries.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from esdtool.checkpoint.base import TensorInfo
from esdtool.modules.reasons import CODEBOOK, LOW_RANK_FACTOR, QUANT_SCALE
from esdtool.modules.skipped import SkipKind, SkipReason

_AVERAGES = re.compile(
    r"(?:\w+_)?ema(?:_\w+)?|\w*shadow\w*|averaged?_(?:model|params|weights)|(?:model|weights|params)_averaged?|swa_model"
)
"""Segments under which trainers keep a moving average of the weights."""
_AVERAGE_SUFFIX = re.compile(r"(.+)[._](?:ema|shadow|averaged?|swa)")
_COUNTS = frozenset(
    {"cluster_size", "cluster_usage", "cluster_sizes", "_ema_cluster_size", "ema_cluster_size", "usage_count"}
)
"""Buffers that count how often each entry of a codebook was used."""
_WEIGHT_HOMES = ("weight", "base_layer.weight", "original_module.weight")
_FEWEST_COPIES = 2
"""A prefix holds a moving average if at least so many of its tensors, or all of them, repeat others."""


def structural_companions(tensors: Mapping[str, TensorInfo]) -> dict[str, SkipReason]:
    """Find the tensors of a checkpoint that belong to others.

    Args:
        tensors: every tensor by its canonical name.

    Returns:
        Why each of them is left out, by canonical name.
    """
    by_parent: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        by_parent[parent][leaf] = tensor
    found = dict(_averages(tensors))
    for parent, children in by_parent.items():
        prefix = f"{parent}." if parent else ""
        for leaf, reason in (*_beside_codes(children), *_group_offsets(children), *_codebooks(children)):
            found.setdefault(prefix + leaf, reason)
    for name in _low_rank_factors(tensors):
        found.setdefault(name, LOW_RANK_FACTOR)
    return found


def _beside_codes(children: Mapping[str, TensorInfo]) -> Iterator[tuple[str, SkipReason]]:
    """Everything of two dimensions or more beside a `weight` of whole numbers describes these codes."""
    codes = children.get("weight")
    if codes is None or len(codes.shape) < 2 or "int" not in codes.dtype or codes.quantization is not None:
        return
    for leaf, tensor in children.items():
        if leaf != "weight" and len(tensor.shape) > 1 and tensor.shape[0] in (codes.shape[0], codes.shape[1], 1):
            yield leaf, QUANT_SCALE


def _group_offsets(children: Mapping[str, TensorInfo]) -> Iterator[tuple[str, SkipReason]]:
    """Scales and offsets of one shape, one of each for a group of weights (MLX, llama.cpp's affine kinds)."""
    for scales, offsets in (("scales", "biases"), ("scale", "zero"), ("scales", "zeros"), ("scale", "zero_point")):
        first, second = children.get(scales), children.get(offsets)
        if first is not None and second is not None and first.shape == second.shape and len(first.shape) > 1:
            yield scales, QUANT_SCALE
            yield offsets, QUANT_SCALE


def _codebooks(children: Mapping[str, TensorInfo]) -> Iterator[tuple[str, SkipReason]]:
    """Tables [entries, width], or [entries, width] transposed, beside the count of each entry's uses."""
    for count in _COUNTS & children.keys():
        entries = children[count].shape[-1:]
        for leaf, tensor in children.items():
            if leaf != count and len(tensor.shape) > 1 and entries and entries[0] in tensor.shape:
                yield leaf, CODEBOOK


def _averages(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, SkipReason]]:
    """Moving averages of weights that are there as well.

    LitEma stores them without the dots of the names, others below a prefix, still others with a suffix.
    """
    candidates = {name: home for name in tensors if (home := _average_home(name)) is not None}
    if not candidates:
        return
    originals: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        if name not in candidates:
            segments = name.split(".")
            for start in range(len(segments)):  # the average's prefix may stand for an outer part of the name
                originals["".join(segments[start:])].append(name)
    matched: dict[str, dict[str, str]] = defaultdict(dict)
    members: dict[str, int] = defaultdict(int)
    for name, (prefix, rest) in candidates.items():
        members[prefix] += 1
        shape = tensors[name].shape
        same = [other for other in originals.get(rest, ()) if tensors[other].shape == shape]
        if same:
            matched[prefix][name] = min(same, key=len)
    for prefix, copies in matched.items():
        if len(copies) >= min(_FEWEST_COPIES, members[prefix]):
            for name, original in copies.items():
                yield (
                    name,
                    SkipReason(kind=SkipKind.COPY, words=f"moving average of {original}, which is scored itself"),
                )


def _average_home(name: str) -> tuple[str, str] | None:
    """(the prefix that says so, the name without it and without dots) of what may be a moving average."""
    segments = name.split(".")
    for position, segment in enumerate(segments[:-1]):
        if _AVERAGES.fullmatch(segment):
            rest = segments[position + 1 :]
            while len(rest) > 1 and rest[0] in ("module", "model", "shadow_params"):
                rest = rest[1:]
            return ".".join(segments[: position + 1]), "".join(rest)
    suffixed = _AVERAGE_SUFFIX.fullmatch(name)
    return None if suffixed is None else ("", suffixed[1].replace(".", ""))


def _low_rank_factors(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Pairs [rank, in] and [out, rank] below the module of a weight [out, in]: the factors of a low-rank update."""
    below: dict[str, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2:
            segments = name.split(".")
            for depth in range(max(1, len(segments) - 3), len(segments)):
                below[".".join(segments[:depth])].append(name)
    for parent, names in below.items():
        homes = [f"{parent}.{home}" for home in _WEIGHT_HOMES]
        weight = next((tensors[home] for home in homes if home in tensors and len(tensors[home].shape) == 2), None)
        if weight is None:
            continue
        others = [name for name in names if name not in homes]
        for first in others:
            for second in others:
                if first != second and _are_factors(tensors[first].shape, tensors[second].shape, weight.shape):
                    yield first
                    yield second


def _are_factors(inner: tuple[int, ...], outer: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Return whether the shapes are those of the factors of an update of `weight`, each stored either way round."""
    rows, columns = weight
    return any(
        rank == other and rank < min(weight)
        for rank in (inner[0] if inner[1] == columns else None, inner[1] if inner[0] == columns else None)
        for other in (outer[1] if outer[0] == rows else None, outer[0] if outer[1] == rows else None)
        if rank is not None and other is not None
    )
