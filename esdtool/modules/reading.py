"""A module's matrices from a checkpoint: as little of its tensor as they need, and low-rank products as small ones."""

from __future__ import annotations

from dataclasses import replace

import torch

from esdtool.checkpoint import Checkpoint
from esdtool.modules import WeightModule

Rows = dict[tuple[str, tuple[int, int]], torch.Tensor]
"""Tensors that were read, by parameter and positions: parts of one fused tensor share them."""


def read_matrices(checkpoint: Checkpoint, module: WeightModule, *, shared: Rows | None = None) -> list[torch.Tensor]:
    """Return the matrices whose eigenvalues are the module's ESD.

    For a module of known low rank r (a LoRA update) that is one small matrix with the same r singular values: the
    others are zero by construction and say nothing.

    Args:
        checkpoint: where the module is from.
        module: the module.
        shared: what was read for other modules; what is read is added.

    Returns:
        Tensors [rows, columns] of one shape in the storage dtype.

    Raises:
        CheckpointError: if the tensor cannot be read.
    """
    if module.rank is not None:
        factors = checkpoint.factors(module.parameter)
        if factors is not None:
            left, right = _factors_of_part(module, *factors)
            # Of a kernel, one product for each position.
            return (
                [product_core(left, part) for part in right.flatten(2).unbind(2)]
                if right.ndim > 2
                else [product_core(left, right)]
            )
    if shared is None:
        return module.matrices_of_rows(read_rows(checkpoint, module))
    key = (module.parameter, module.rows)
    if key not in shared:
        shared[key] = read_rows(checkpoint, module)
    return module.matrices_of_rows(shared[key])


def read_rows(checkpoint: Checkpoint, module: WeightModule) -> torch.Tensor:
    """Return the positions of the parameter's first dimension that hold the module."""
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
    """Return the factors of the module's part of a product: one of a stack, some rows, or some columns."""
    view = module.view
    if view is not None and view.expert is not None and left.ndim > 2:
        left, right = left[view.expert], right[view.expert]
        view = replace(view, expert=None, num_experts=1)
    if view is None or view.stop is None:
        return left, right
    if view.axis == 0:
        return view.part(left[slice(*view.rows(tuple(left.shape)))]), right
    return left, view.part(right)
