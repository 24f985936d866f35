"""The modules that two checkpoints share.

Counterparts have equal shapes and equal names, or else the same place (block, role, expert) where only one module on
either side has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from esdtool.names import canonical_name, module_path, place_of_block, without_root


class Placed(Protocol):
    """A module of a model, analysed or not."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def expert(self) -> int | None: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


_Ours = TypeVar("_Ours", bound=Placed)
_Theirs = TypeVar("_Theirs", bound=Placed)


@dataclass(frozen=True, kw_only=True)
class Counterparts(Generic[_Theirs]):
    """The other checkpoint's modules by the names of ours."""

    pairs: Mapping[str, _Theirs]
    wrong_shape: Mapping[str, _Theirs]
    """Modules of the same name that are no counterparts: their shapes differ."""


def find_counterparts(modules: Sequence[_Ours], others: Sequence[_Theirs]) -> Counterparts[_Theirs]:
    """Find each module's counterpart among the others: by name, by name without outer prefixes, by place."""
    pairs: dict[str, _Theirs] = {}
    wrong_shape: dict[str, _Theirs] = {}
    keys: tuple[Callable[[Placed], Hashable], ...] = (_name, _bare_name, _place)
    for key in keys:
        left = _by_key((module for module in modules if module.name not in pairs), key)
        taken = {module.name for module in pairs.values()}
        right = _by_key((module for module in others if module.name not in taken), key)
        for found, ours in left.items():
            theirs = right.get(found, [])
            if len(ours) != 1 or len(theirs) != 1:
                continue
            if _comparable(ours[0], theirs[0]):
                pairs[ours[0].name] = theirs[0]
            elif key is _name:
                wrong_shape[ours[0].name] = theirs[0]
    return Counterparts(pairs=pairs, wrong_shape=wrong_shape)


_Any = TypeVar("_Any", bound=Placed)


def _by_key(modules: Iterable[_Any], key: Callable[[Placed], Hashable]) -> dict[Hashable, list[_Any]]:
    found: dict[Hashable, list[_Any]] = defaultdict(list)
    for module in modules:
        found[key(module)].append(module)
    return found


def _name(module: Placed) -> Hashable:
    return canonical_name(module.name)


def _bare_name(module: Placed) -> Hashable:
    """Return the name without outer prefixes such as `model.`: a base model and one with a head differ in them."""
    return without_root(module_path(module.name))


def _place(module: Placed) -> Hashable:
    """Tower, block, role and expert, whatever the names between them; outside blocks the end of the name."""
    path = module_path(module.name)
    place = place_of_block(path, module.layer)
    if place is None:
        return module.role, path[-2:]
    tower = "vision" if any("vis" in segment for segment in path[:place]) else "text"
    side = next((segment for segment in path if segment in ("encoder", "decoder")), "")
    return tower, side, module.layer, module.role, module.expert


def _comparable(module: Placed, other: Placed) -> bool:
    """Return whether the shapes are equal, or a matrix's and its transpose's (Conv1D beside Linear)."""
    return module.shape == other.shape or (len(module.shape) == 2 and module.shape == other.shape[::-1])
