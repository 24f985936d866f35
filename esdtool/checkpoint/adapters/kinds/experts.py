"""PEFT's LoRA on a parameter (`target_parameters`): the experts of a mixture in one tensor, each with its own factors.

A [experts * rank, in] holds the experts one after the other; in B [out, rank * experts] they alternate. Wrappers of
several parameters of one module are nested, and a tensor's name tells only how deep: the innermost is the parameter
that the module registered first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from esdtool.checkpoint.adapters.base import AdapterKind, Context, Group, UnfitError, Update, shown
from esdtool.checkpoint.adapters.kinds.lora import LoraUpdate, check_factors, has_pair
from esdtool.checkpoint.base import Checkpoint

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True, kw_only=True)
class _ExpertUpdate(LoraUpdate):
    """The updates of all experts."""

    experts: int

    def pair(self, source: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the factors [experts, out, rank], times the scale, and [experts, rank, in]."""
        left, right = (source.read(name).double() for name in (self.left, self.right))
        if self.experts == 1:
            return left * self.scale, right
        stacked = left.reshape(left.shape[0], -1, self.experts).permute(2, 0, 1)
        return stacked * self.scale, right.reshape(self.experts, -1, right.shape[1])


def _build(group: Group, context: Context) -> Update:
    check_factors(group, context)
    left, right = group.parts["left"], group.parts["right"]
    of_left, of_right = context.shape(left), context.shape(right)
    parameter = _parameter(group, context)
    key = f"{group.module}.{parameter}"
    rank = context.scales.rank(key)
    if rank is None or of_left[1] != of_right[0] or of_right[0] % rank:
        raise UnfitError(f"{shown(left, of_left)} and {shown(right, of_right)} are no experts' factors of rank {rank}")
    experts = of_right[0] // rank
    alpha = context.scales.alpha(key, context.config.lora_alpha)
    if alpha is None:
        context.guessed.add(group.module)
    scale = 1.0 if alpha is None else alpha / (rank**0.5 if context.config.use_rslora else rank)
    shape = (of_left[0], of_right[1]) if experts == 1 else (experts, of_left[0], of_right[1])
    return _ExpertUpdate(
        info=context.info(group, shape, rank=rank, weight=parameter),
        stored=tuple(group.parts.values()),
        target=key,
        left=left,
        right=right,
        scale=scale,
        experts=experts,
    )


def _parameter(group: Group, context: Context) -> str:
    """Name of the parameter that a wrapper wraps.

    Raises:
        UnfitError: if the module has several and neither their names nor their shapes tell which it is.
    """
    names = _targets(group, context)
    nested = sorted(
        (other for other in context.groups if (other.module, other.adapter) == (group.module, group.adapter)),
        key=lambda other: -other.depth,
    )
    if len(names) == len(nested) == 1:
        return names[0]
    if len(nested) == 2 and set(names) == {_GATE_UP, _DOWN}:
        # gate_up maps H to 2 I and down I to H: mostly the sizes tell. Modules register gate_up first.
        first, second = (_sizes(other, context) for other in nested)
        order = [_GATE_UP, _DOWN]
        if second == (2 * first[1], first[0]) and first != (2 * second[1], second[0]):
            order.reverse()
        return order[nested.index(group)]
    raise UnfitError(
        f"{group.parts['left']} is of one of the parameters {', '.join(names)}, and the file does not tell which; "
        "merge it with PEFT and analyse the merged model"
    )


def _sizes(group: Group, context: Context) -> tuple[int, int]:
    return context.shape(group.parts["left"])[0], context.shape(group.parts["right"])[1]


def _targets(group: Group, context: Context) -> list[str]:
    """Return the names of the parameters of a group's module that the configuration targets."""
    return sorted({name for name in map(_in_module(group), context.config.target_parameters or ()) if name})


def _in_module(group: Group) -> _Matcher:
    return _Matcher(group.module)


@dataclass(frozen=True)
class _Matcher:
    """Tells which parameter of a module a target names."""

    module: str

    def __call__(self, target: str) -> str | None:
        """Return the parameter's own name; None if the target is of another module."""
        path, _, name = target.rpartition(".")
        return name if not path or self.module == path or self.module.endswith(f".{path}") else None


def _claims(group: Group, context: Context) -> bool:
    if not has_pair(group, context) or not (targets := _targets(group, context)):
        return False
    named = [target for target in context.config.target_parameters or () if "." in target]
    if any(_Matcher(group.module)(target) for target in named):
        return True
    # A bare name may be of any module: only a wrapper's factors hold several experts.
    rank = context.scales.rank(f"{group.module}.{targets[0]}")
    rows: Sequence[int] = context.shape(group.parts["right"])
    return rank is not None and bool(rows) and rows[0] > rank and rows[0] % rank == 0


KIND = AdapterKind(name="LoRA", endings={}, claims=_claims, build=_build, precedence=1)
