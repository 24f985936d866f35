"""Eigenvalues of stacks of matrices on an accelerator.

Weights go up as they are stored and are converted there. In float32, Gram matrices of 16-bit weights are formed from
these directly, with exact products and sums in float32, which tensor cores do several times faster than products of
float32. What the accelerator's solver fails on, the CPU computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy.typing as npt
import torch

from esdtool.spectra.accelerator_solvers import on_device_or_cpu, solve_on_accelerator
from esdtool.spectra.options import Solver
from esdtool.spectra.precision import full_precision_matmul

_MIN_BLOCK = 2048
"""Shortest slice of the long side that is multiplied at a time."""

_SELF_TEST_ERROR = 1e-6
"""Largest error of a product of 16-bit matrices, as a share of its largest element: float32 sums, not 16-bit ones."""


def accelerator_eigenvalues(stack: torch.Tensor, *, dtype: torch.dtype) -> tuple[npt.NDArray[Any], Solver]:
    """Return the eigenvalues of W^T W of each matrix of a stack, by their Gram matrices.

    Args:
        stack: [batch, rows, columns] on the accelerator, floating point.
        dtype: float32 or float64, of the Gram matrices and the solver.

    Returns:
        [batch * min(rows, columns)], ascending within each matrix, and who computed them.
    """
    return solve_on_accelerator(gram_matrices(stack, dtype=dtype))


def accelerator_svd(stack: torch.Tensor) -> npt.NDArray[Any]:
    """Return the eigenvalues of W^T W of each matrix of a stack, by float64 singular values.

    Args:
        stack: [batch, rows, columns] on the accelerator, floating point.

    Returns:
        [batch * min(rows, columns)], descending within each matrix.
    """
    return on_device_or_cpu(squared_singular_values, stack).cpu().numpy().reshape(-1)


def gram_matrices(stack: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Return the Gram matrices on the short side.

    Args:
        stack: [batch, rows, columns], floating point.
        dtype: float32 or float64.

    Returns:
        [batch, n, n] of that dtype, n = min(rows, columns).
    """
    wide = stack if stack.shape[1] <= stack.shape[2] else stack.mT
    order = wide.shape[1]
    gram = torch.zeros(wide.shape[0], order, order, dtype=dtype, device=stack.device)
    direct = dtype == torch.float32 and stack.dtype.itemsize == 2 and multiplies_16_bit(stack.dtype, stack.device)
    # A setting of the whole process: left alone where it has no effect, for the sake of training steps beside us.
    with full_precision_matmul() if dtype == torch.float32 else nullcontext():
        for block in wide.split(max(order, _MIN_BLOCK), dim=2):
            if direct:
                gram += _product_16_bit(block)
            else:
                part = block.to(dtype)
                gram.baddbmm_(part, part.mT)
    return gram


def _product_16_bit(block: torch.Tensor) -> torch.Tensor:
    """Return `block @ block.mT` [batch, n, n] in float32 of a 16-bit `block` [batch, n, k]."""
    product: torch.Tensor = torch.bmm(block, block.mT, out_dtype=torch.float32)
    return product


@cache
def multiplies_16_bit(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether products of 16-bit matrices with float32 results work on a device, and sum in float32.

    Backends lack them, and some add partial sums in 16 bits, which would cost three of the digits: hence a self-test,
    with a long sum of positive products, once per device.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        sample = torch.rand(1, 8, 16384, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = sample.to(torch.float64) @ sample.to(torch.float64).mT
        found = _product_16_bit(sample.to(device)).cpu()
    except (RuntimeError, TypeError):  # not implemented on this backend, or by this torch
        return False
    error = (found.to(torch.float64) - expected).abs().max() / expected.max()
    return found.dtype == torch.float32 and float(error) < _SELF_TEST_ERROR


def squared_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """Return the squared singular values of [..., rows, columns] in float64, descending."""
    # LAPACK is 2-3 times slower on wide matrices.
    tall = matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT
    singular: torch.Tensor = torch.linalg.svdvals(tall.to(torch.float64))
    return singular.square()


def stacked_on(matrices: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Copy matrices of one shape to a device as they are stored, and stack them there.

    On CUDA they go through pinned memory, of which torch keeps a pool, so that the copy runs beside what other streams
    compute.

    Args:
        matrices: [rows, columns] each.
        device: the accelerator.

    Returns:
        [batch, rows, columns].
    """
    if device.type == "cuda":
        matrices = [matrix.pin_memory() if matrix.device.type == "cpu" else matrix for matrix in matrices]
    return torch.stack([matrix.to(device, non_blocking=matrix.is_pinned()) for matrix in matrices])
