"""Finding the model's tensors in whatever a trainer saved: bare, under a key, or beside an optimizer's state.

The functions work on any tree of mappings and lists, so that they serve pickles, state
dicts in memory and the catalogue of a torch.distributed.checkpoint folder alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

from esdtool.checkpoint.other_files import OPTIMIZER_STATE
from esdtool.errors import CheckpointError
from esdtool.support.words import listed


class HasShape(Protocol):
    """A tensor, or what stands for one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        ...


T = TypeVar("T", bound=HasShape)

_MODEL_KEYS = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "module",
    "weights",
    "params",
    "net",
    "network",
    "app",
)
"""Keys under which trainers keep the model, the most telling first."""
_AVERAGE_KEYS = ("ema", "model_ema", "ema_model", "ema_state_dict", "ema_params", "shadow_params")
"""Keys of averaged copies: taken only where there is no other model."""
_TRAINER_KEY = re.compile(
    r"optims?|optimi[sz]ers?|(model_)?optim(izer)?_(state|states|state_dict|dict)|.*_(optim|optimizer|optimizer_states?)"
    r"|(lr_)?schedulers?(_state|_states|_state_dict)?|(grad_)?scaler(_state|_state_dict)?|amp"
    r"|.*rng_states?.*|random_states?|callbacks|loops|dataloader|train_state|hyper_parameters|args|config",
    re.IGNORECASE,
)
_OPTIMIZER_PREFIX = re.compile(r"(optims?|optimi[sz]ers?)\.", re.IGNORECASE)
_DEEPEST = 32

_ALIASES = 16
"""Names that a tensor has on average at most, where containers are shared between several places."""


@dataclass(frozen=True, kw_only=True)
class ModelTensors(Generic[T]):
    """The model's part of a saved tree."""

    tensors: Mapping[str, T]
    """Flat: nested names are joined by dots."""
    notes: tuple[str, ...]
    """Under which key they lay and what was left out, each starting with the file's name."""


def model_tensors(tree: object, is_tensor: Callable[[object], bool], *, file: str) -> ModelTensors[T]:
    """Pick the model's tensors out of a saved tree and flatten their names.

    At the top, a key that trainers use for the model (`model`, `state_dict`, ...), or else the
    only branch with tensors, is entered. Optimizer states are left out. Otherwise the
    whole tree is the model.

    Args:
        tree: mappings and lists, with tensors at the leaves.
        is_tensor: tells a tensor from any other leaf.
        file: name for messages.

    Raises:
        CheckpointError: if there is no tensor, two have the same flattened name, or the whole is an optimizer's state.
    """
    if isinstance(tree, Mapping) and {"state", "param_groups"} <= set(tree) and not set(tree) & set(_MODEL_KEYS):
        raise CheckpointError(f"{file}: {OPTIMIZER_STATE}")
    entered: list[str] = []
    left_out: list[str] = []
    found = _Tensors(tree, is_tensor)
    node = tree
    while isinstance(node, Mapping) and len(entered) < _DEEPEST:
        key, others = _branch(node, found, top=not entered)
        left_out += [".".join([*entered, other]) for other in others]
        if key is None:
            if others:
                dropped = set(others)
                node = {name: value for name, value in node.items() if str(name) not in dropped}
            break
        entered.append(str(key))
        node = node[key]

    if len(entered) == _DEEPEST:
        raise CheckpointError(f"{file}: keys nested more than {_DEEPEST} deep; a structure that contains itself?")
    if is_tensor(tree):
        raise CheckpointError(f"{file}: holds one bare tensor without a name; save it as {{name: tensor}}")
    tensors: dict[str, T] = {}
    for path, leaf in _leaves(node, found):
        if len(tensors) > _ALIASES * found.count + _ALIASES:
            raise CheckpointError(
                f"{file}: refused: {found.count} tensors under more than {len(tensors)} names: its lists and mappings "
                "share their members"
            )
        name = ".".join(path)
        if name in tensors:
            raise CheckpointError(f"{file}: two tensors have the name {name!r} once nested names are joined")
        tensors[name] = cast(T, leaf)
    if not tensors:
        only = f" of a model, only {', '.join(map(repr, left_out))}" if left_out else ""
        raise CheckpointError(f"{file}: holds no tensors{only}; is it the checkpoint's weight file?")
    notes = []
    if entered:
        notes.append(f"{file}: the tensors under the key {'.'.join(entered)!r} are read")
    if left_out:
        notes.append(f"{file}: left out: {listed(map(repr, left_out), 8)}")
    return ModelTensors(tensors=tensors, notes=tuple(notes))


class _Tensors:
    """The containers of a tree that hold tensors, at any depth. Each is walked once, however often it is shared."""

    def __init__(self, tree: object, is_tensor: Callable[[object], bool]) -> None:
        self.is_tensor = is_tensor
        parents: dict[int, list[int]] = {}
        holders: list[int] = []
        tensors: set[int] = set()
        todo = [tree]
        seen = {id(tree)}
        while todo:
            node = todo.pop()
            for _, child in _children(node):
                if is_tensor(child):
                    tensors.add(id(child))
                    holders.append(id(node))
                elif isinstance(child, Mapping | list | tuple):
                    parents.setdefault(id(child), []).append(id(node))
                    if id(child) not in seen:
                        seen.add(id(child))
                        todo.append(child)
        self.count = len(tensors)
        """Different tensors."""
        self._holding: set[int] = set()
        while holders:
            holder = holders.pop()
            if holder not in self._holding:
                self._holding.add(holder)
                holders += parents.get(holder, ())

    def below(self, node: object) -> bool:
        """Return whether a container holds a tensor."""
        return id(node) in self._holding


def _branch(node: Mapping[object, object], found: _Tensors, *, top: bool) -> tuple[object | None, list[str]]:
    """Return the key to enter, or None to stop here; and the keys with tensors that are left out by that."""
    direct = {key: value for key, value in node.items() if found.is_tensor(value)}
    branches = {key: value for key, value in node.items() if key not in direct and found.below(value)}
    trainer = [key for key in branches if _is_trainers(key, branches[key])]
    trainer += [key for key in direct if _OPTIMIZER_PREFIX.match(str(key))]
    models = [key for key in branches if key not in trainer]
    weights = [key for key, value in direct.items() if key not in trainer and _numel(value) > 1]

    chosen: object | None = next((key for key in _MODEL_KEYS if key in models), None)
    if chosen is None and not weights:
        average = next((key for key in _AVERAGE_KEYS if key in models), None)
        chosen = average if average is not None else models[0] if top and len(models) == 1 else None
    if not top and (len(models) > 1 or weights):
        # Below the top a key that sounds like a wrapper may be a module's name: enter it only if nothing else is there.
        chosen = None
    others = [key for key in (*direct, *branches) if key != chosen] if chosen is not None else trainer
    return chosen, [str(key) for key in others]


def _is_trainers(key: object, value: object) -> bool:
    """Return whether a branch is the state of an optimizer or another part of the trainer."""
    if isinstance(value, Mapping) and "state" in value and "param_groups" in value:
        return True
    return _TRAINER_KEY.fullmatch(str(key)) is not None


def _numel(tensor: object) -> int:
    shape: tuple[int, ...] = getattr(tensor, "shape", ())
    return math.prod(shape)


def _children(node: object) -> Iterator[tuple[str, object]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield str(key), value
    elif isinstance(node, list | tuple):
        for position, value in enumerate(node):
            yield str(position), value


def _leaves(
    node: object, found: _Tensors, path: tuple[str, ...] = (), above: frozenset[int] = frozenset()
) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield every tensor below a mapping or list with its path."""
    if id(node) in above or len(path) > _DEEPEST:
        return
    for key, child in _children(node):
        if found.is_tensor(child):
            yield (*path, key), child
        elif found.below(child):
            yield from _leaves(child, found, (*path, key), above | {id(node)})
