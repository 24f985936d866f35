"""Compute what fine-tuning changed: the modules of two checkpoints side by side.

Modules are compared, not tensors: a fused projection meets its separate counterparts, a stack of experts the
experts' own files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from esdtool.checkpoint import Checkpoint
from esdtool.modules import WeightModule
from esdtool.modules.reading import read_rows
from esdtool.spectra.spectrum import rounding_error

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(matrix of a module, matrix of its counterpart) of one shape; one pair for each position of a kernel."""


def difference(
    checkpoint: Checkpoint, module: WeightModule, base: Checkpoint, base_module: WeightModule
) -> tuple[list[torch.Tensor], float]:
    """Subtract a base: (W - W_base of each matrix, relative rounding error of the difference).

    Raises:
        CheckpointError: if a tensor cannot be read.
    """
    return difference_of(read_pairs(checkpoint, module, base, base_module), module, base_module)


def difference_of(pairs: Pairs, module: WeightModule, base_module: WeightModule) -> tuple[list[torch.Tensor], float]:
    """Subtract the second matrix of each pair from the first: (differences, their relative rounding error).

    The subtraction is done in float32, or float64 where a side is; the rounding of either side's storage stays in
    the difference, and can be all that there is of it.

    Args:
        pairs: as `read_pairs` gives them.
        module: the module of the first matrices.
        base_module: the module of the second.
    """
    differences, squares, noise = [], 0.0, 0.0
    for new, old in pairs:
        dtype = torch.float64 if torch.float64 in (new.dtype, old.dtype) else torch.float32
        change = new.to(dtype) - old.to(dtype)
        differences.append(change)
        squares += _sum_of_squares(change)
        # Weights that are equal to the last bit carry no rounding into the difference.
        moved = change != 0
        for side, info in ((new, module), (old, base_module)):
            error = info.roundoff if info.roundoff is not None else rounding_error(side.dtype)
            noise += error**2 * _sum_of_squares(side.to(dtype) * moved)
    return differences, math.sqrt(noise / squares) if squares > 0 else 0.0


def read_pairs(checkpoint: Checkpoint, module: WeightModule, base: Checkpoint, base_module: WeightModule) -> Pairs:
    """Read a module and its counterpart, which may be stored as its transpose; low-rank updates are multiplied out.

    Raises:
        CheckpointError: if a tensor cannot be read.
    """
    ours = module.matrices_of_rows(read_rows(checkpoint, module))
    theirs = base_module.matrices_of_rows(read_rows(base, base_module))
    return [
        (new, (old if old.shape == new.shape else old.T).to(new.device)) for new, old in zip(ours, theirs, strict=True)
    ]


def _sum_of_squares(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
