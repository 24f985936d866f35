"""Cutting a tensor that holds several modules: which parts it has, and where each of them lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from esdtool.checkpoint.base import TensorInfo
from esdtool.modules.base import View
from esdtool.modules.layouts import Fusion, Split, UnknownLayoutError, sizes_of
from esdtool.modules.rules import Fused, Stacked
from esdtool.names import Segments, module_path

_EXPERTS = "experts"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One module within a tensor."""

    name: str
    """Name that the module would have if it were stored alone."""
    qualified_name: str
    """Name below the tensor's own, for where the other one is taken."""
    role: str
    view: View


def split_tensor(
    tensor: TensorInfo,
    verdict: Fused | Stacked,
    *,
    config: Mapping[str, Any],
    neighbours: Mapping[str, tuple[int, ...]],
    whole_experts: bool = False,
) -> list[Piece]:
    """Return the modules in a fused or stacked tensor, expert by expert, in the order in which they lie there.

    Args:
        tensor: the catalogue's entry.
        verdict: what the tables say of it.
        config: the model's config.json; empty if there is none.
        neighbours: shapes of the tensors of the modules beside it, by last name.
        whole_experts: keep what is fused within an expert's matrix together.

    Raises:
        UnknownLayoutError: if it cannot be told where the parts lie.
    """
    path = module_path(tensor.name)
    sizes = sizes_of(config, path)
    if isinstance(verdict, Fused):
        fusion = Fusion(shape=tensor.shape, parts=len(verdict.parts), config=sizes, neighbours=neighbours)
        views = _views(verdict.layout(fusion))
        return [_piece(path, role, view) for role, view in zip(verdict.parts, views, strict=True)]

    experts = _num_experts(tensor, sizes)
    stack = View(expert=0, num_experts=experts)
    shape = stack.shape(tensor.shape)
    parts: tuple[str, ...] = verdict.parts
    views = [View()]
    if len(parts) > 1 and whole_experts:
        parts = (path[-1],)
    elif len(parts) > 1:
        beside = {name: View(expert=0, num_experts=experts).shape(other) for name, other in neighbours.items()}
        views = _views(
            verdict.layout(Fusion(shape=shape, parts=len(parts), config=sizes, neighbours=beside, stacked=True))
        )
    return [
        _piece(path, role, replace(view, expert=expert, num_experts=experts))
        for expert in range(experts)
        for role, view in zip(parts, views, strict=True)
    ]


def _num_experts(tensor: TensorInfo, sizes: Mapping[str, Any]) -> int:
    """Length of the stack: the first of three dimensions, or what the configuration says of two."""
    if len(tensor.shape) == 3:
        return tensor.shape[0]
    fusion = Fusion(shape=tensor.shape, parts=1, config=sizes, neighbours={})
    experts = fusion.need("ffn_config.moe_num_experts", "num_local_experts", "num_experts", "moe_num_experts")
    if tensor.shape[0] % experts:
        raise UnknownLayoutError(
            f"its {tensor.shape[0]} rows are no multiple of the {experts} experts of config.json",
            config_would_tell=True,
        )
    return experts


def _views(split: Split) -> list[View]:
    views, start = [], 0
    for size in split.sizes:
        views.append(View(axis=split.axis, groups=split.groups, start=start, stop=start + size))
        start += size
    return views


def _piece(path: Segments, role: str, view: View) -> Piece:
    parent = list(path[:-1])
    if view.expert is not None:
        parent += [] if _EXPERTS in parent else [_EXPERTS]
        parent.append(str(view.expert))
    leaf = role.removeprefix("cross_")  # which the parent's name says already
    return Piece(
        name=".".join([*parent, leaf]),
        qualified_name=".".join([*path, *([] if view.expert is None else [str(view.expert)]), leaf]),
        role=role,
        view=view,
    )
