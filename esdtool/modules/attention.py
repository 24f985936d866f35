"""Attention blocks: which modules are the projections of one attention, and where each head lies in them.

The heads of a projection are contiguous and equal parts: rows of q, k and v, columns of o; with GPT-2's Conv1D, which
is stored transposed, the other way round. The model's configuration tells how many heads of queries there are, and how
wide; how many heads share keys and values follows from the width of k.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final, Literal

from esdtool.modules.base import WeightModule
from esdtool.modules.layouts import Fusion, sizes_of
from esdtool.names import place_of_block
from esdtool.support.words import dimensions

if TYPE_CHECKING:
    import torch

Part = Literal["q", "k", "v", "o"]

PRODUCTS: Final[Mapping[str, tuple[Part, Part]]] = {"qk": ("q", "k"), "vo": ("o", "v")}
"""The products of two projections of a head, by name: the second is applied first."""

_CROSS = "cross_"
_PARTS: Final[Mapping[str, Part]] = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}

_NOT_SOFTMAX = "linear_attn"
"""Name of the blocks whose projections have these roles, and heads of another number (Qwen3-Next)."""


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One projection of an attention block."""

    module: WeightModule
    heads: int
    """Heads in it: of the queries in q and o, of keys and values in k and v."""
    axis: int
    """The axis of the stored matrix along which the heads lie."""

    @property
    def width(self) -> int:
        """The width of a head."""
        return self.module.shape[self.axis] // self.heads

    @property
    def outer(self) -> int:
        """The number of channels outside the heads."""
        return self.module.shape[1 - self.axis]

    def of_head(self, matrix: torch.Tensor, head: int) -> torch.Tensor:
        """Return the part [width, outer] of the module's matrix that belongs to a head."""
        part = matrix.narrow(self.axis, head * self.width, self.width)
        return part if self.axis == 0 else part.T


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention block."""

    name: str
    """What the names of its projections begin with, e.g. `model.layers.0.self_attn`."""
    layer: int | None
    heads: int
    key_value_heads: int
    """Heads of keys and values; each is shared by heads / key_value_heads queries."""
    projections: Mapping[Part, Projection]
    """The projections that are analysed; usually all four."""

    @property
    def modules(self) -> tuple[WeightModule, ...]:
        """The modules of the projections, in the order of `projections`."""
        return tuple(projection.module for projection in self.projections.values())

    def group_of(self, head: int) -> int:
        """Return the head of keys and values that a head of queries uses."""
        return head * self.key_value_heads // self.heads

    def products(self) -> list[str]:
        """Name the products that can be formed: both factors are there, with heads of one width."""
        return [
            name for name, (one, other) in PRODUCTS.items() if one in self.projections and other in self.projections
        ]


@dataclass(frozen=True, kw_only=True)
class LeftOutAttention:
    """An attention block whose heads are not analysed, and why."""

    name: str
    reason: str


def find_attention(
    modules: Sequence[WeightModule], config: Mapping[str, Any]
) -> tuple[tuple[Attention, ...], tuple[LeftOutAttention, ...]]:
    """Find the attention blocks among the modules of a model.

    Args:
        modules: of a selection.
        config: the model's config.json, or what stands for it.

    Returns:
        Those whose heads are known, and those that are left out; both in the order of their first modules.
    """
    found, left_out = [], []
    for members in _blocks(modules):
        name = _common_name([module.name for module in members])
        try:
            found.append(_attention(name, members, config))
        except _UnknownHeadsError as problem:
            left_out.append(LeftOutAttention(name=name, reason=str(problem)))
    return tuple(found), tuple(left_out)


class _UnknownHeadsError(Exception):
    """The heads of an attention block are not known; the message says why."""


def _blocks(modules: Iterable[WeightModule]) -> list[list[WeightModule]]:
    """Gather the projections of each attention: of one layer and kind, or, where these are several, of a parent."""
    layers: dict[object, list[WeightModule]] = {}
    for module in modules:
        if module.role.removeprefix(_CROSS) in _PARTS and module.kind == "linear" and module.rank is None:
            path = tuple(module.name.split("."))
            place = None if module.layer is None else place_of_block(path, module.layer)
            where = path[:-1] if place is None else path[: place + 1]
            layers.setdefault((where, module.role.startswith(_CROSS), module.expert), []).append(module)
    blocks: list[list[WeightModule]] = []
    for members in layers.values():
        parents: dict[object, list[WeightModule]] = {}
        several = len({module.role for module in members}) < len(members)
        for module in members:
            parents.setdefault(module.name.rpartition(".")[0] if several else None, []).append(module)
        blocks += parents.values()
    return blocks


def _attention(name: str, members: Sequence[WeightModule], config: Mapping[str, Any]) -> Attention:
    by_part = {_PARTS[module.role.removeprefix(_CROSS)]: module for module in members}
    if len(by_part) < len(members):
        raise _UnknownHeadsError("several of its modules have one role")
    path = tuple(name.split("."))
    if members[0].expert is not None or _NOT_SOFTMAX in path:
        raise _UnknownHeadsError("its heads are not those of config.json")
    sizes = Fusion(shape=(), parts=1, config=_sizes(config, path), neighbours={})
    if sizes.size("kv_lora_rank", "qk_nope_head_dim") is not None:
        raise _UnknownHeadsError("its heads share a latent (multi-head latent attention), which is not supported")
    heads = sizes.heads
    if heads is None:
        raise _UnknownHeadsError("config.json does not tell the number of its heads")
    transposed = any(
        part != "o" and module.view is not None and module.view.stop is not None and module.view.axis == 1
        for part, module in by_part.items()
    )
    width = sizes.head_dim
    projections: dict[Part, Projection] = {}
    for part in ("q", "k", "v", "o"):
        if part not in by_part:
            continue
        module = by_part[part]
        axis = int(transposed) if part != "o" else 1 - int(transposed)
        shared = heads
        if part in ("k", "v"):
            first = projections.get("k")
            shared = first.heads if first is not None else _shared(module, axis, width or 0, heads)
        projection = Projection(module=module, heads=shared, axis=axis)
        expected = width if part in ("q", "k") else None
        if part == "o" and "v" in projections:
            expected = projections["v"].width
        length = module.shape[axis]
        if length % shared or (expected is not None and length // shared != expected):
            of = f" of {expected}" if expected is not None else " of one width"
            side = "columns" if axis else "rows"
            raise _UnknownHeadsError(
                f"the {length} {side} of {module.name} [{dimensions(module.shape)}] are not {shared} heads{of}, "
                "as config.json says"
            )
        if part == "q":
            width = projection.width
        projections[part] = projection
    groups = [projections[part].heads for part in ("k", "v") if part in projections]
    return Attention(
        name=name,
        layer=members[0].layer,
        heads=heads,
        key_value_heads=groups[0] if groups else heads,
        projections=projections,
    )


def _sizes(config: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the sizes of the part of the model that a block belongs to; BART's decoder has heads of its own."""
    sizes = sizes_of(config, path)
    own = sizes.get("decoder_attention_heads") if "decoder" in path else None
    return sizes if own is None else {**sizes, "num_attention_heads": own}


def _shared(module: WeightModule, axis: int, width: int, heads: int) -> int:
    """Return how many heads a projection of keys or values has, by the width of the queries' heads."""
    found, rest = divmod(module.shape[axis], width) if width else (heads, 0)
    if rest or not found or heads % found:
        side = "columns" if axis else "rows"
        raise _UnknownHeadsError(
            f"the {module.shape[axis]} {side} of {module.name} [{dimensions(module.shape)}] are not heads of {width} "
            f"that {heads} heads of queries can share, as config.json says"
        )
    return found


def _common_name(names: Sequence[str]) -> str:
    """Return the segments that all names begin with; of a single name all but the last."""
    paths = [name.split(".")[:-1] for name in names]
    shared = takewhile(lambda segments: len(set(segments)) == 1, zip(*paths, strict=False))
    return ".".join(segments[0] for segments in shared) or names[0]
