"""What fine-tuning changed: the modules of two checkpoints side by side.

Modules are compared, not tensors: a fused projection meets its separate counterparts, a stack of experts the
experts' own files. Counterparts have equal shapes and equal names, or else the same place (block, role, expert)
where only one module on either side has it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from esdtool.checkpoint import Checkpoint
from esdtool.checkpoint.base import canonical_name, dimensions
from esdtool.modules import WeightModule
from esdtool.modules.base import SkippedTensor
from esdtool.modules.names import block_position, module_path, without_root
from esdtool.reading import read_matrices
from esdtool.spectrum import rounding_error


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Which modules of two checkpoints are the same."""

    base: Mapping[str, WeightModule]
    """The base's module by the other's name."""
    unmatched: tuple[SkippedTensor, ...]
    """Modules of either checkpoint without a counterpart, with the reason."""


def pair_modules(
    modules: Sequence[WeightModule], base_modules: Sequence[WeightModule], *, location: str, base_location: str
) -> Pairing:
    """Find each module's counterpart in the base.

    Args:
        modules: of the checkpoint.
        base_modules: of the base.
        location: the checkpoint's, for the reasons.
        base_location: the base's.
    """
    pairs: dict[str, WeightModule] = {}
    wrong_shape: dict[str, WeightModule] = {}
    keys: tuple[Callable[[WeightModule], Hashable], ...] = (_name, _bare_name, _place)
    for key in keys:
        left = _by_key((module for module in modules if module.name not in pairs), key)
        taken = {module.name for module in pairs.values()}
        right = _by_key((module for module in base_modules if module.name not in taken), key)
        for found, ours in left.items():
            theirs = right.get(found, [])
            if len(ours) != 1 or len(theirs) != 1:
                continue
            if _comparable(ours[0], theirs[0]):
                pairs[ours[0].name] = theirs[0]
            elif key is _name:
                wrong_shape[ours[0].name] = theirs[0]
    taken = {module.name for module in (*pairs.values(), *wrong_shape.values())}
    unmatched = [
        _unmatched(module, _reason(module, wrong_shape.get(module.name), base_location))
        for module in modules
        if module.name not in pairs
    ]
    unmatched += [
        _unmatched(module, f"only in the base: {location} has no such module")
        for module in base_modules
        if module.name not in taken
    ]
    return Pairing(base=pairs, unmatched=tuple(unmatched))


def difference(
    checkpoint: Checkpoint, module: WeightModule, base: Checkpoint, base_module: WeightModule
) -> tuple[list[torch.Tensor], float]:
    """(W - W_base of each matrix, relative rounding error of the difference).

    The subtraction is done in float32, or float64 where a side is; the rounding of either side's storage stays in
    the difference, and can be all that there is of it.

    Raises:
        CheckpointError: if a tensor cannot be read.
    """
    ours, theirs = read_matrices(checkpoint, module), read_matrices(base, base_module)
    differences, squares, noise = [], 0.0, 0.0
    for new, old in zip(ours, theirs, strict=True):
        dtype = torch.float64 if torch.float64 in (new.dtype, old.dtype) else torch.float32
        aligned = old if old.shape == new.shape else old.T
        change = new.to(dtype) - aligned.to(device=new.device, dtype=dtype)
        differences.append(change)
        squares += _sum_of_squares(change)
        # Weights that are equal to the last bit carry no rounding into the difference.
        moved = change != 0
        for side, info in ((new, module), (aligned, base_module)):
            error = info.roundoff if info.roundoff is not None else rounding_error(side.dtype)
            noise += error**2 * _sum_of_squares(side.to(dtype) * moved)
    return differences, math.sqrt(noise / squares) if squares > 0 else 0.0


def _sum_of_squares(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def _by_key(
    modules: Iterable[WeightModule], key: Callable[[WeightModule], Hashable]
) -> dict[Hashable, list[WeightModule]]:
    found: dict[Hashable, list[WeightModule]] = defaultdict(list)
    for module in modules:
        found[key(module)].append(module)
    return found


def _name(module: WeightModule) -> Hashable:
    return canonical_name(module.name)


def _bare_name(module: WeightModule) -> Hashable:
    """The name without outer prefixes such as `model.`: a base model and one with a head differ in them."""
    return without_root(module_path(module.name))


def _place(module: WeightModule) -> Hashable:
    """Tower, block, role and expert, whatever the names between them; outside blocks the end of the name."""
    path = module_path(module.name)
    block = block_position(path)
    if block is None:
        return module.role, path[-2:]
    tower = "vision" if any("vis" in segment for segment in path[: block[0]]) else "text"
    side = next((segment for segment in path if segment in ("encoder", "decoder")), "")
    return tower, side, module.layer, module.role, module.expert


def _comparable(module: WeightModule, base: WeightModule) -> bool:
    """Whether the shapes are equal, or a matrix's and its transpose's (Conv1D beside Linear)."""
    if module.kind != base.kind or module.num_matrices != base.num_matrices:
        return False
    return module.shape == base.shape or (module.kind == "linear" and module.shape == base.shape[::-1])


def _reason(module: WeightModule, other: WeightModule | None, base_location: str) -> str:
    if other is None:
        return f"not in the base {base_location}"
    return f"shape {dimensions(module.shape)}, but {dimensions(other.shape)} in the base {base_location}"


def _unmatched(module: WeightModule, reason: str) -> SkippedTensor:
    return SkippedTensor(name=module.name, shape=module.shape, dtype=module.dtype, reason=reason)
