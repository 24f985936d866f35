"""One tensor's verdict, from its name, its shape, its dtype and its neighbours."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from esdtool.checkpoint.base import TensorInfo
from esdtool.checkpoint.quantized.base import FLOAT8
from esdtool.checkpoint.quantized.scales import WEIGHT_SCALES
from esdtool.checkpoint.quantized.settings import read_settings
from esdtool.modules import general, layouts
from esdtool.modules.companions import structural_companions
from esdtool.modules.established import common_root, established_tables
from esdtool.modules.families import load_families
from esdtool.modules.heads import output_heads
from esdtool.modules.identification import PERHAPS_SEVERAL, IdentifiedBy
from esdtool.modules.reasons import NORM_OR_BIAS, OUTPUT_HEAD, PATCH_EMBEDDING, QUANT_CODES
from esdtool.modules.rules import (
    Fused,
    Rule,
    Score,
    Skip,
    Stacked,
    Table,
    Verdict,
    matches,
    names_a_number,
)
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
_ATTENTION = re.compile(r"att|kv|glu|gate")
_IMAGE_CHANNELS = frozenset({1, 3, 4})
_SMALLEST_PATCH = 8
"""Side of the smallest patches of vision transformers, in pixels; smaller kernels may be ordinary convolutions."""
_LONGEST_NAMELESS_KERNEL = 15
_CONVOLUTION = re.compile(r".*(conv|cnn|tdnn|downsample|upsample|kernel|stem|patch).*")
"""Segments that only convolutions have in their names."""


@dataclass(frozen=True, kw_only=True)
class Identified:
    """The verdict on a tensor, and what it rests on."""

    verdict: Verdict
    by: IdentifiedBy
    rule: str
    """The table and the pattern that decided, or what of the shape did; for the user."""
    note: str | None = None


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
        self._companions = structural_companions(self._tensors)
        established = established_tables(
            load_families(),
            model_types=_model_types(self._config),
            kinds=frozenset(_kind(path) for path in self._by_path),
        )
        self._is_established = established.is_established
        root = common_root(self._by_path)
        self._find_companion = _Lookup([Table(name="companions", rules=general.COMPANIONS)], self._children, root=root)
        self._find_named = _Lookup(established.tables, self._children, root=root)
        self._heads = output_heads(self._by_path, root=root)

    def verdict(self, tensor: TensorInfo) -> Verdict:
        """Decide what to do with one of the checkpoint's tensors."""
        return self.identify(tensor).verdict

    def identify(self, tensor: TensorInfo) -> Identified:
        """Decide what to do with one of the checkpoint's tensors, and say what the decision rests on."""
        name = canonical_name(tensor.name)
        companion = self._find_companion(tuple(name.split(".")))
        if companion is not None and isinstance(companion.verdict, Skip):
            return Identified(verdict=companion.verdict, by=IdentifiedBy.FAMILY, rule=companion.words)
        if name in self._companions:
            return _by_structure(Skip(reason=self._companions[name], forceable=False))
        unsuitable = self._unsuitable(tensor)
        if unsuitable is not None:
            return _by_structure(unsuitable)
        path = module_path(tensor.name)
        if _RECURRENT.fullmatch(path[-1]):
            return Identified(
                verdict=self._recurrent(tensor, path), by=IdentifiedBy.FAMILY, rule="torch's recurrent layers"
            )
        found = self._find_named(path)
        by = IdentifiedBy.SHAPE if found is None or not self._is_sure(found) else IdentifiedBy.FAMILY
        rule = "no rule names it" if found is None else found.words
        named = None if found is None else found.verdict
        if not isinstance(named, Skip) and path in self._heads:
            return _by_structure(Skip(reason=OUTPUT_HEAD))
        if not isinstance(named, Skip | Fused | Stacked) and self._is_patch_embedding(tensor):
            return _by_structure(Skip(reason=PATCH_EMBEDDING))
        if isinstance(named, Fused):
            if self._is_stack(tensor, path):
                named = Stacked(parts=named.parts, layout=named.layout)
            else:
                named = Fused(parts=tuple(_cross(path, role) for role in named.parts), layout=named.layout)
        if isinstance(named, Skip | Stacked | Fused):
            return Identified(verdict=named, by=by, rule=rule)
        score = named or Score(role=leaf_role(tensor))
        if len(tensor.shape) == 2:
            verdict = self._twice_as_wide(tensor, path, score) or Score(role=_cross(path, score.role))
            several = named is None and by is IdentifiedBy.SHAPE and self._may_be_several(tensor, path)
            return Identified(verdict=verdict, by=by, rule=rule, note=PERHAPS_SEVERAL if several else None)
        return Identified(verdict=self._kernel(tensor, path, score), by=by, rule=rule)

    def _is_sure(self, found: _Match) -> bool:
        """Return whether a family is established: the rule's own, or one that general names go with."""
        return found.is_established or self._is_established

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

    def _kernel(self, tensor: TensorInfo, path: Segments, score: Score) -> Verdict:
        """A tensor of three or more dimensions: a convolution, or many matrices in one."""
        if score.headwise and len(tensor.shape) == 3:
            return score
        if self._is_stack(tensor, path):
            return Stacked(parts=(score.role,))
        if not is_weight(tensor.name) or len(tensor.shape) > 5:
            what = f"{len(tensor.shape)}-D parameter ({dimensions(tensor.shape)})"
            return _unknown_layout(f"{what} of unknown layout", forceable=False)
        if not _looks_like_kernel(tensor.shape, path):
            what = f"{len(tensor.shape)}-D weight ({dimensions(tensor.shape)})"
            return _unknown_layout(f"{what}: a convolution or stacked matrices, its name does not tell")
        if tensor.shape[1] == 1:
            words = "convolution with one input channel for each filter (depthwise): vectors, not matrices"
            return Skip(reason=SkipReason(kind=SkipKind.NO_MATRIX, words=words))
        return Score(role=_cross(path, score.role))

    def _is_patch_embedding(self, tensor: TensorInfo) -> bool:
        """Return whether a convolution takes patches of an image's few channels, as vision transformers begin."""
        if len(tensor.shape) != 4 or not is_weight(tensor.name):
            return False
        _, channels, height, width = tensor.shape
        return channels in _IMAGE_CHANNELS and height == width >= _SMALLEST_PATCH and height % 2 == 0

    def _may_be_several(self, tensor: TensorInfo, path: Segments) -> bool:
        """Return whether the shape is that of projections side by side.

        That is three times as long as wide, or twice in an attention.

        A module beside it with the transposed shape shows an ordinary pair of an MLP, which is as long. Layers of a
        Sequential follow one another, and are one projection each.
        """
        rows, columns = tensor.shape
        several = rows == 3 * columns or columns == 3 * rows
        several |= rows == 2 * columns and any(_ATTENTION.search(segment.lower()) for segment in path)
        if not several or path[-1].isdecimal():
            return False
        parent = path[:-1]
        beside = (self._by_path.get((*parent, leaf)) for leaf in self._children[parent] - {path[-1]})
        return not any(other is not None and other.shape == tensor.shape[::-1] for other in beside)

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
            match = self._find_named((*parent, leaf)) if sibling is not None and len(sibling.shape) == 2 else None
            verdict = None if match is None else match.verdict
            if sibling is not None and isinstance(verdict, Score) and verdict.role == _PARTNERS[score.role]:
                if tensor.shape != (2 * sibling.shape[1], sibling.shape[0]):
                    return None
                if score.role == "q_proj":
                    return Fused(parts=("q_proj", "q_gate"), layout=layouts.per_head)
                return Fused(parts=score.halves, layout=layouts.stacked_rows)
        return None


@dataclass(frozen=True, kw_only=True)
class _Match:
    """A rule that names a tensor, and the table that it stands in."""

    rule: Rule
    table: str
    is_established: bool
    """Whether the table is that of a family which the checkpoint is known to belong to."""

    @property
    def verdict(self) -> Verdict:
        """What the rule says."""
        return self.rule.verdict

    @property
    def words(self) -> str:
        """The rule for the user."""
        beside = "" if self.rule.beside is None else f" beside {self.rule.beside}"
        return f"{self.table}: {self.rule.pattern}{beside}"


class _Lookup:
    """Finds the first matching rule of the tables; remembered for each kind of name, as blocks differ in a number."""

    def __init__(self, tables: Iterable[Table], children: Mapping[Segments, set[str]], *, root: int) -> None:
        self._root = root
        self._rules = [
            _Match(rule=rule, table=table.name, is_established=table.is_established)
            for table in tables
            for rule in table.rules
        ]
        self._children = children
        self._matching: dict[Segments, tuple[_Match, ...]] = {}

    def __call__(self, path: Segments) -> _Match | None:
        kind = _kind(path)
        found = self._matching.get(kind)
        if found is None:
            found = self._matching[kind] = tuple(
                match
                for match in self._rules
                if names_a_number(match.rule) or matches(match.rule, kind, root=self._root)
            )
        siblings = self._children.get(path[:-1], set())
        return next(
            (
                match
                for match in found
                if (match.rule.beside is None or match.rule.beside in siblings)
                and (not names_a_number(match.rule) or matches(match.rule, path, root=self._root))
            ),
            None,
        )


def _by_structure(verdict: Skip) -> Identified:
    return Identified(verdict=verdict, by=IdentifiedBy.SHAPE, rule="shape, dtype and neighbours")


def _looks_like_kernel(shape: tuple[int, ...], path: Segments) -> bool:
    """Return whether [out, in, *kernel] is a convolution, by its name, or by a kernel of a usual size.

    Stacked matrices [heads, rows, columns] have long last dimensions; so have few convolutions, and these are named
    or stand in a Sequential. Blocks of a block-diagonal matrix are square.
    """
    kernel = shape[2:]
    if any(_CONVOLUTION.fullmatch(segment.lower()) for segment in path):
        return True
    if len(shape) > 3:
        return max(kernel) <= LONGEST_UNNAMED_KERNEL
    (length,) = kernel
    if path[-1].isdecimal():
        return length <= LONGEST_UNNAMED_KERNEL
    return length == 1 or (length % 2 == 1 and length <= _LONGEST_NAMELESS_KERNEL and length != shape[1])


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


def _model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """`model_type` of the configuration and of its parts (`text_config`, `vision_config`, ...)."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return frozenset(value for part in parts if isinstance(value := part.get("model_type"), str))
