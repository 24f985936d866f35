"""Compute what fine-tuning changed: the modules of two checkpoints side by side.

Modules are compared, not tensors: a fused projection meets its separate counterparts, a stack of experts the
experts' own files.
"""

from __future__ import annotations

import math

import torch

from esdtool.checkpoint import Checkpoint
from esdtool.modules import WeightModule
from esdtool.modules.reading import read_matrices
from esdtool.spectra.spectrum import rounding_error


def difference(
    checkpoint: Checkpoint, module: WeightModule, base: Checkpoint, base_module: WeightModule
) -> tuple[list[torch.Tensor], float]:
    """Subtract a base: (W - W_base of each matrix, relative rounding error of the difference).

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
