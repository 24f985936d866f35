"""Compute what fine-tuning changed: the modules of two checkpoints side by side.

Modules are compared, not tensors: a fused projection meets its separate counterparts, a stack of experts the
experts' own files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from esdtool.analysis.pairing import find_counterparts
from esdtool.checkpoint import Checkpoint
from esdtool.modules import SkipKind, SkippedTensor, WeightModule
from esdtool.modules.reading import read_matrices
from esdtool.spectra.spectrum import rounding_error
from esdtool.support.words import dimensions


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """The modules that two checkpoints share."""

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
    found = find_counterparts(modules, base_modules)
    taken = {module.name for module in (*found.pairs.values(), *found.wrong_shape.values())}
    unmatched = [
        _unmatched(module, _reason(module, found.wrong_shape.get(module.name), base_location))
        for module in modules
        if module.name not in found.pairs
    ]
    unmatched += [
        _unmatched(module, f"only in the base: {location} has no such module")
        for module in base_modules
        if module.name not in taken
    ]
    return Pairing(base=found.pairs, unmatched=tuple(unmatched))


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


def _reason(module: WeightModule, other: WeightModule | None, base_location: str) -> str:
    if other is None:
        return f"not in the base {base_location}"
    return f"shape {dimensions(module.shape)}, but {dimensions(other.shape)} in the base {base_location}"


def _unmatched(module: WeightModule, reason: str) -> SkippedTensor:
    return SkippedTensor(
        name=module.name, shape=module.shape, dtype=module.dtype, kind=SkipKind.NO_COUNTERPART, reason=reason
    )
