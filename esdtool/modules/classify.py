"""One tensor's verdict, from its name, its shape, its dtype and its neighbours."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from esdtool.checkpoint.base import TensorInfo
from esdtool.checkpoint.quantized.base import FLOAT8
from esdtool.checkpoint.quantized.scales import WEIGHT_SCALES
from esdtool.checkpoint.quantized.settings import read_settings
from esdtool.modules import general, layouts
from esdtool.modules.families import load_families
from esdtool.modules.reasons import NORM_OR_BIAS, QUANT_CODES
from esdtool.modules.rules import Fused, Rule, Score, Skip, Stacked, Verdict, compile_pattern, matches
from esdtool.modules.skipped import SkipKind, SkipReason
from esdtool.modules.split import Piece, split_tensor
from esdtool.names import Segments, canonical_name, module_path
from esdtool.support.words import dimensions

FLOAT_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"}) | FLOAT8
"""Storage dtypes whose values are weights as they stand."""

LONGEST_UNNAMED_KERNEL = 128
"""A 3-D `weight` with a longer last dimension, and no `conv` in its name, may be a stack of matrices."""

_ATTENTION_ROLES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_CROSS = re.compile(general.CROSS_ATTENTION)
_STACKED = re.compile(general.STACKED_IF_3D)
_RECURRENT = re.compile(r"weight_(?:ih|hh)(?:_l\d+(?:_reverse)?)?")
_GATES = {
    3.0: ("reset_gate", "update_gate", "new_gate"),  # torch.nn.GRU
    4.0: ("input_gate", "forget_gate", "cell_gate", "output_gate"),  # torch.nn.LSTM
}
_PARTNERS = {"up_proj": "down_proj", "q_proj": "o_proj"}


class Classifier:
    """Verdicts on the tensors of one checkpoint.

    Args:
        tensors: every tensor of the checkpoint; neighbours decide some verdicts (a scale beside an
            fp8 weight, experts beside a router), so a part of the tensors is not enough.
        config: the model's config.json, if there is one.
    """

    def __init__(self, tensors: Iterable[TensorInfo], config: Mapping[str, Any] | None = None) -> None:
        self._tensors = {canonical_name(tensor.name): tensor for tensor in tensors}
        self._by_path: dict[Segments, TensorInfo] = {}
        self._children: dict[Segments, set[str]] = defaultdict(set)
        for tensor in self._tensors.values():
            path = module_path(tensor.name)
            self._by_path[path] = tensor
            for depth, child in enumerate(path):
                self._children[path[:depth]].add(child)
        self._quantisation = read_settings(config or {}).method
        self._config = config or {}
        rules = _rules_for(_model_types(config or {}), {_kind(path) for path in self._by_path})
        self._find_companion = _Lookup(general.COMPANIONS, self._children)
        self._find_named = _Lookup(rules, self._children)

    def verdict(self, tensor: TensorInfo) -> Verdict:
        """Decide what to do with one tensor of the checkpoint, and why."""
        companion = self._find_companion(tuple(canonical_name(tensor.name).split(".")))
        if companion is not None:
            return companion
        unsuitable = self._unsuitable(tensor)
        if unsuitable is not None:
            return unsuitable
        path = module_path(tensor.name)
        if _RECURRENT.fullmatch(path[-1]):
            return self._recurrent(tensor, path)
        named = self._find_named(path)
        if isinstance(named, Fused):
            if self._is_stack(tensor, path):
                return Stacked(parts=named.parts, layout=named.layout)
            return Fused(parts=tuple(_cross(path, role) for role in named.parts), layout=named.layout)
        if isinstance(named, Skip | Stacked):
            return named
        score = named or Score(role=leaf_role(tensor))
        if len(tensor.shape) == 2:
            return self._twice_as_wide(tensor, path, score) or Score(role=_cross(path, score.role))
        return self._kernel(tensor, path, score.role)

    def pieces(self, tensor: TensorInfo, verdict: Fused | Stacked, *, whole_experts: bool = False) -> list[Piece]:
        """The modules in a tensor of which `verdict` says that it holds several.

        Raises:
            UnknownLayoutError: if it cannot be told where they lie.
        """
        parent = module_path(tensor.name)[:-1]
        neighbours = {
            leaf: self._by_path[(*parent, leaf)].shape
            for leaf in self._children[parent]
            if (*parent, leaf) in self._by_path
        }
        return split_tensor(tensor, verdict, config=self._config, neighbours=neighbours, whole_experts=whole_experts)

    def _unsuitable(self, tensor: TensorInfo) -> Skip | None:
        """Explain why dtype, shape or scale exclude the tensor whatever its name."""
        reason: SkipReason | None = None
        if tensor.dtype not in FLOAT_DTYPES:
            reason = self._not_float(tensor)
        elif not tensor.shape:
            reason = SkipReason(kind=SkipKind.NO_MATRIX, words="scalar")
        elif len(tensor.shape) == 1:
            reason = NORM_OR_BIAS
        elif tensor.numel == 0:
            reason = SkipReason(kind=SkipKind.NO_MATRIX, words="empty tensor")
        elif len(tensor.shape) > 2 and tensor.numel == max(tensor.shape):
            reason = SkipReason(kind=SkipKind.NO_MATRIX, words=f"a vector stored as a {len(tensor.shape)}-D tensor")
        elif is_weight(tensor.name) and tensor.quantization is None:
            reason = self._scaled(tensor)
        return None if reason is None else Skip(reason=reason, forceable=False)

    def _scaled(self, tensor: TensorInfo) -> SkipReason | None:
        """Explain why a float tensor holds codes and not weights: another tensor holds its scale."""
        base = canonical_name(tensor.name).removesuffix("weight")
        for suffix in WEIGHT_SCALES:
            scale = self._tensors.get(base + suffix)
            if scale is not None:
                return SkipReason(
                    kind=SkipKind.QUANTIZATION,
                    words=f"{tensor.dtype} values with a separate scale ({scale.name}) that could not be applied",
                )
        return None

    def _not_float(self, tensor: TensorInfo) -> SkipReason:
        """Explain why a tensor whose dtype is not a float is left out."""
        if tensor.dtype == "bool":
            return SkipReason(kind=SkipKind.BUFFER, words="boolean mask or buffer")
        if tensor.dtype.startswith("complex"):
            return SkipReason(kind=SkipKind.OTHER, words=f"complex values ({tensor.dtype})")
        if "float" in tensor.dtype:  # float8_e8m0fnu is an exponent, float4 comes packed
            words = f"{tensor.dtype}: scale or packed codes of quantised weights"
            return SkipReason(kind=SkipKind.QUANTIZATION, words=words)
        if is_weight(tensor.name) and len(tensor.shape) >= 2:
            method = f"{self._quantisation}, " if self._quantisation else ""
            return replace(QUANT_CODES, words=f"{QUANT_CODES.words} ({method}{tensor.dtype})")
        return SkipReason(kind=SkipKind.BUFFER, words=f"integer buffer ({tensor.dtype})")

    def _recurrent(self, tensor: TensorInfo, path: Segments) -> Verdict:
        """Weights of nn.RNN, nn.GRU, nn.LSTM: [gates * hidden, in]; one gate is a plain matrix."""
        hidden = self._by_path.get((*path[:-1], path[-1].replace("_ih", "_hh", 1)), tensor).shape
        if len(tensor.shape) != 2 or len(hidden) != 2 or 0 in hidden:
            return _unknown_layout("weight of a recurrent layer of unknown layout", forceable=False)
        gates = hidden[0] / hidden[1]
        if gates == 1:
            return Score(role=path[-1])
        if gates not in _GATES:
            return _unknown_layout(f"weight of a recurrent layer with {gates:g} gates", forceable=False)
        return Fused(parts=_GATES[gates], layout=layouts.stacked_rows)

    def _is_stack(self, tensor: TensorInfo, path: Segments) -> bool:
        """Return whether the tensor stacks the matrices of several experts, [experts, ., .]."""
        return len(tensor.shape) == 3 and any(_STACKED.fullmatch(segment) for segment in path)

    def _kernel(self, tensor: TensorInfo, path: Segments, role: str) -> Verdict:
        """A tensor of three or more dimensions: a convolution, or many matrices in one."""
        if self._is_stack(tensor, path):
            return Stacked(parts=(role,))
        if not is_weight(tensor.name) or len(tensor.shape) > 5:
            what = f"{len(tensor.shape)}-D parameter ({dimensions(tensor.shape)})"
            return _unknown_layout(f"{what} of unknown layout", forceable=False)
        named_conv = any("conv" in segment.lower() for segment in path)
        if len(tensor.shape) == 3 and not named_conv and tensor.shape[2] > LONGEST_UNNAMED_KERNEL:
            what = f"3-D weight ({dimensions(tensor.shape)})"
            return _unknown_layout(f"{what}: a convolution or stacked matrices, its name does not tell")
        if tensor.shape[1] == 1:
            words = "convolution with one input channel for each filter (depthwise): vectors, not matrices"
            return Skip(reason=SkipReason(kind=SkipKind.NO_MATRIX, words=words))
        return Score(role=_cross(path, role))

    def _twice_as_wide(self, tensor: TensorInfo, path: Segments, score: Score) -> Fused | None:
        """A projection that its neighbour shows to be two: the widths tell what the name does not.

        An MLP's `up` [2I, H] beside `down` [H, I] holds gate and up (ChatGLM, ModernBERT, Moonshine);
        a query [2A, H] beside `o` [H, A] holds query and output gate (Qwen3-Next). The test cannot
        mistake a transposed (Conv1D) pair: [H, I] beside [I, H] would need H = 2H.
        """
        if score.role not in _PARTNERS:
            return None
        parent = path[:-1]
        siblings = self._children[parent]
        if "kv_b_proj" in siblings:  # multi-head latent attention: query and value heads differ in width
            return None
        for leaf in sorted(siblings - {path[-1]}):
            sibling = self._by_path.get((*parent, leaf))
            verdict = self._find_named((*parent, leaf)) if sibling is not None and len(sibling.shape) == 2 else None
            if sibling is not None and isinstance(verdict, Score) and verdict.role == _PARTNERS[score.role]:
                if tensor.shape != (2 * sibling.shape[1], sibling.shape[0]):
                    return None
                if score.role == "q_proj":
                    return Fused(parts=("q_proj", "q_gate"), layout=layouts.per_head)
                return Fused(parts=score.halves, layout=layouts.stacked_rows)
        return None


class _Lookup:
    """First matching rule of a table, remembered for each kind of name: blocks differ only in their number."""

    def __init__(self, rules: Iterable[Rule], children: Mapping[Segments, set[str]]) -> None:
        self._rules = tuple(rules)
        self._children = children
        self._matching: dict[Segments, tuple[Rule, ...]] = {}

    def __call__(self, path: Segments) -> Verdict | None:
        kind = _kind(path)
        rules = self._matching.get(kind)
        if rules is None:
            rules = self._matching[kind] = tuple(rule for rule in self._rules if matches(rule, kind))
        siblings = self._children.get(path[:-1], set())
        return next((rule.verdict for rule in rules if rule.beside is None or rule.beside in siblings), None)


def _unknown_layout(words: str, *, forceable: bool = True) -> Skip:
    return Skip(reason=SkipReason(kind=SkipKind.UNKNOWN_LAYOUT, words=words), forceable=forceable)


def is_weight(parameter: str) -> bool:
    """Return whether a parameter is the `weight` of a module."""
    return parameter.rpartition(".")[2] == "weight"


def leaf_role(tensor: TensorInfo) -> str:
    """Role of a module that no rule names: its own last name, or `linear`/`conv` if that is a number."""
    leaf = module_path(tensor.name)[-1]
    if leaf.isdecimal() or leaf == "weight":
        return "linear" if len(tensor.shape) == 2 else "conv"
    return leaf


def _cross(path: Segments, role: str) -> str:
    if role in _ATTENTION_ROLES and any(_CROSS.fullmatch(segment) for segment in path):
        return f"cross_{role}"
    return role


def _kind(path: Segments) -> Segments:
    """A name with every number replaced by 0."""
    return tuple("0" if segment.isdecimal() else segment for segment in path)


def _rules_for(model_types: frozenset[str], kinds: set[Segments]) -> tuple[Rule, ...]:
    """The rules that hold for the checkpoint, in order of precedence."""
    families: list[Rule] = []
    for family in load_families():
        marked = family.marker is not None and _any_match(family.marker, kinds)
        if not family.model_types or family.model_types & model_types or marked:
            families.extend(family.rules)
    return (*families, *general.NOT_SCORED, *general.MANY_IN_ONE, *general.ROLES)


def _any_match(pattern: str, kinds: set[Segments]) -> bool:
    regex = compile_pattern(pattern)
    return any(regex.search(".".join(kind)) for kind in kinds)


def _model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """`model_type` of the configuration and of its parts (`text_config`, `vision_config`, ...)."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return frozenset(value for part in parts if isinstance(value := part.get("model_type"), str))
