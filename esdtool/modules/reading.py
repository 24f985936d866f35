"""A module's matrices from a checkpoint: as little of its tensor as they need, and low-rank products as small ones."""

from __future__ import annotations

import torch

from esdtool.checkpoint import Checkpoint
from esdtool.modules import WeightModule


def read_matrices(checkpoint: Checkpoint, module: WeightModule) -> list[torch.Tensor]:
    """The matrices whose eigenvalues are the module's ESD.

    For a module of known low rank r (a LoRA update) that is one small matrix with the same r singular values: the
    others are zero by construction and say nothing.

    Returns:
        Tensors [rows, columns] of one shape in the storage dtype.

    Raises:
        CheckpointError: if the tensor cannot be read.
    """
    if module.rank is not None:
        factors = checkpoint.factors(module.parameter)
        if factors is not None:
            return [product_core(*_factors_of_part(module, *factors))]
    return module.matrices_of_rows(read_rows(checkpoint, module))


def read_rows(checkpoint: Checkpoint, module: WeightModule) -> torch.Tensor:
    """The positions of the parameter's first dimension that hold the module."""
    start, stop = module.rows
    if (start, stop) == (0, module.stored_shape[0]):
        return checkpoint.read(module.parameter)
    return checkpoint.read_rows(module.parameter, start, stop)


def product_core(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A matrix of at most [r, r] with the singular values of a product of low rank, those that are always 0 aside.

    With left [m, r] = Q1 R1 and right [r, n] = R2^T Q2^T, the product is Q1 (R1 R2^T) Q2^T, and orthonormal columns
    change no singular value.
    """
    first: torch.Tensor = torch.linalg.qr(left.to(torch.float64), mode="r").R
    second: torch.Tensor = torch.linalg.qr(right.to(torch.float64).mT, mode="r").R
    return first @ second.mT


def _factors_of_part(
    module: WeightModule, left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the module's part of a fused product: some rows of the left one, or columns of the right one."""
    view = module.view
    if view is None or view.stop is None:
        return left, right
    if view.axis == 0:
        return view.part(left[slice(*module.rows)]), right
    return left, view.part(right)
