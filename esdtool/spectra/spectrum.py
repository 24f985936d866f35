"""From weight matrices to the eigenvalues of W^T W: the empirical spectral density (ESD).

Three exact paths, from fast to robust. With n = min(rows, columns), u = unit roundoff:

- `gram-float32`: Gram matrix on the short side and its eigenvalues in float32.
- `gram-float64`: the same in float64. It beats an SVD 2-9 times and its error stays near
  4 u lambda_max for every eigenvalue, whatever the storage dtype.
- `svd-float64`: singular values, squared. Its error in lambda is below 256 u sqrt(lambda lambda_max):
  the only path that resolves eigenvalues below u lambda_max.

Each path reports its own error, so that the caller (`esdtool.spectra.scoring`) can accept a
result or climb to the next one. An eigenvalue that a path cannot tell from zero is
returned as exactly 0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from esdtool.spectra.accelerator import (
    accelerator_eigenvalues,
    accelerator_svd,
    squared_singular_values,
    stacked_on,
)
from esdtool.spectra.lapack import gram_matrix, symmetric_eigenvalues
from esdtool.spectra.options import Solver, SpectrumPath

_EPS32 = float(np.finfo(np.float32).eps)
_EPS64 = float(np.finfo(np.float64).eps)

_GRAM_ERROR = {"gram-float32": 6e-8, "gram-float64": 4 * _EPS64}
"""Absolute error of an eigenvalue over lambda_max. Measured on planted spectra; typically 10 times smaller."""

_SAFE_EXPONENT = {"gram-float32": 40, "gram-float64": 400, "svd-float64": 400}
"""Largest |log2 max|W|| whose squares and sums cannot overflow or underflow in the path's precision."""

_MIN_BLOCK = 2048
"""Shortest slice of the long side that is converted and multiplied at a time."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The ESD of one module, and how far it can be trusted."""

    eigenvalues: npt.NDArray[np.float64]
    """[num_eigs] over 2^`exponent`, ascending. Numerically zero ones are exactly 0."""
    path: SpectrumPath
    """How they were computed."""
    resolution: float
    """Eigenvalues at or below this cannot be told from zero by the path; they are returned as 0."""
    storage_floor: float
    """Eigenvalues at or below this can be nothing but the rounding of the stored weights (see `storage_floor`)."""
    solver: Solver = "torch"
    """Who computed them; where several matrices are pooled, the last one's."""
    exponent: int = 0
    """An even number; 0 but for weights whose squares overflow or lose digits in float64 (near 1e-155 and 1e153).
    It applies to `resolution` and `storage_floor` too. What depends on ratios of eigenvalues, as alpha does, may
    ignore it."""

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue, over 2^`exponent`."""
        return float(self.eigenvalues[-1])

    def unscaled(self, value: float, *, power: int = 1) -> float | None:
        """Undo the scaling of a number.

        Args:
            value: a number of the dimension of eigenvalues, computed from `eigenvalues`; not negative.
            power: 1 over the power of the eigenvalues that the number is: 2 for one of the dimension of weights.

        Returns:
            None where float64 has no number of that size, or only one of fewer digits.
        """
        if self.exponent == 0 or value == 0:
            return value
        try:
            true = math.ldexp(value, self.exponent // power)
        except OverflowError:
            return None
        return true if true >= sys.float_info.min else None

    def relative_error(self, eigenvalue: float) -> float:
        """Bound on the relative error of an eigenvalue of this size; infinite at 0."""
        if eigenvalue <= 0:
            return math.inf
        ratio = self.lambda_max / eigenvalue
        if self.path == "svd-float64":
            return 128 * _EPS64 * math.sqrt(ratio)
        return _GRAM_ERROR[self.path] * ratio


def compute_spectrum(
    matrices: Sequence[torch.Tensor],
    path: SpectrumPath,
    *,
    device: torch.device | None = None,
    scale: float = 1.0,
    peak: float | None = None,
    roundoff: float | None = None,
) -> Spectrum:
    """Return the pooled ESD of `matrices` by one path.

    Args:
        matrices: one or more tensors [rows, columns] of one shape, floating point, finite, not all zero.
        path: the path to take.
        device: where to compute; default the matrices' own device. A solver that fails on an accelerator is
            repeated on the CPU.
        scale: factor of the eigenvalues.
        peak: the matrices' largest absolute element, if the caller knows it already.
        roundoff: relative rounding error of the stored weights, where it is not that of the matrices' dtype.

    Returns:
        All `min(rows, columns) * len(matrices)` eigenvalues.
    """
    device = matrices[0].device if device is None else device
    exponent = scaling_exponent(peak_of(matrices) if peak is None else peak, path)
    scaled = [times_power_of_two(matrix, -exponent) for matrix in matrices] if exponent else matrices
    if device.type == "cpu":
        found = [_eigenvalues_cpu(matrix.cpu(), path) for matrix in scaled]
        eigenvalues, solver = np.concatenate([each for each, _ in found]), found[-1][1]
    else:
        eigenvalues, solver = _eigenvalues_device(stacked_on(scaled, device), path)
    return _assess(
        eigenvalues.astype(np.float64),
        matrices,
        path,
        solver=solver,
        scale=scale,
        roundoff=roundoff,
        exponent=2 * exponent,
    )


def compute_stacked(
    matrices: Sequence[torch.Tensor],
    path: SpectrumPath,
    *,
    device: torch.device,
    scales: Sequence[float],
    roundoffs: Sequence[float | None],
) -> list[Spectrum]:
    """Return the ESD of each of several matrices of one shape, all in one product and one call of the solver.

    For an accelerator, which small matrices one by one leave idle. Arguments and results as of `compute_spectrum`, one
    each; matrices whose `scaling_exponent` is not 0 cannot take part.
    """
    found, solver = _eigenvalues_device(stacked_on(matrices, device), path)
    each = found.astype(np.float64).reshape(len(matrices), -1)
    return [
        _assess(eigenvalues, [matrix], path, solver=solver, scale=scale, roundoff=roundoff)
        for eigenvalues, matrix, scale, roundoff in zip(each, matrices, scales, roundoffs, strict=True)
    ]


def _assess(
    eigenvalues: npt.NDArray[np.float64],
    matrices: Sequence[torch.Tensor],
    path: SpectrumPath,
    *,
    solver: Solver,
    scale: float,
    roundoff: float | None,
    exponent: int = 0,
) -> Spectrum:
    """Sort eigenvalues over 2^`exponent`, and tell apart what the path does not resolve."""
    rows, columns = matrices[0].shape
    eigenvalues = np.sort(eigenvalues) * scale
    resolution = _zero_floor(path, min(rows, columns)) * float(eigenvalues[-1])
    eigenvalues[eigenvalues <= resolution] = 0.0
    if exponent and _fit_into_float64(eigenvalues, exponent):
        eigenvalues, resolution, exponent = np.ldexp(eigenvalues, exponent), math.ldexp(resolution, exponent), 0
    mean_square = float(eigenvalues.sum()) / (rows * columns * len(matrices))
    return Spectrum(
        eigenvalues=eigenvalues,
        path=path,
        solver=solver,
        resolution=resolution,
        storage_floor=storage_floor((rows, columns), mean_square, matrices[0].dtype, roundoff),
        exponent=exponent,
    )


def _fit_into_float64(eigenvalues: npt.NDArray[np.float64], exponent: int) -> bool:
    """Tell whether eigenvalues times 2^`exponent` and their sum keep all their digits in float64."""
    smallest = math.frexp(float(eigenvalues[eigenvalues > 0].min(initial=eigenvalues[-1])))[1] + exponent
    largest = math.frexp(float(eigenvalues.sum()))[1] + exponent
    return sys.float_info.min_exp < smallest and largest < sys.float_info.max_exp


def times_power_of_two(matrix: torch.Tensor, exponent: int) -> torch.Tensor:
    """Multiply a matrix by 2^`exponent` in float64, exactly."""
    # In two steps, because 2^1074, by which the smallest float64 is brought near 1, is no float64 itself.
    half = exponent // 2
    return matrix.to(torch.float64) * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)


def esd(matrix: torch.Tensor | npt.ArrayLike, *, path: SpectrumPath = "gram-float64") -> npt.NDArray[np.float64]:
    """Return the eigenvalues of W^T W for one matrix: its squared singular values.

    >>> esd(np.diag([3.0, 1.0, 2.0])).tolist()
    [1.0, 4.0, 9.0]

    Args:
        matrix: [rows, columns], a tensor or anything that numpy reads, floating point, finite, not all zero.
        path: how to compute them; see the module's docstring.

    Returns:
        [min(rows, columns)] float64, ascending. Those that the path cannot tell from zero are 0.

    Raises:
        ValueError: if the matrix is not 2-D, empty, all zero, or contains NaN or infinity, or if its eigenvalues
            overflow or vanish in float64.
    """
    tensor = matrix.detach() if isinstance(matrix, torch.Tensor) else torch.from_numpy(np.array(matrix))
    if tensor.ndim != 2 or tensor.numel() == 0:
        raise ValueError(f"an ESD needs a 2-D matrix with elements, not shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.float64)
    peak = peak_of([tensor])
    if not math.isfinite(peak):
        raise ValueError("the matrix contains NaN or infinity")
    if peak == 0:
        raise ValueError("all elements of the matrix are zero")
    spectrum = compute_spectrum([tensor], path, peak=peak)
    if spectrum.exponent:
        raise ValueError(f"the squares of elements of size {peak:.1e} overflow or vanish in float64: scale the matrix")
    return spectrum.eigenvalues


def storage_floor(
    shape: tuple[int, int], mean_square: float, dtype: torch.dtype, roundoff: float | None = None
) -> float:
    """Return the largest eigenvalue that rounding errors in the weights alone would give.

    Independent errors of root mean square e rms(W) form a random matrix of spectral norm
    e rms(W) (sqrt(rows) + sqrt(columns)) (Marchenko and Pastur 1967); eigenvalues below its square carry no information
    about the weights. For e see `rounding_error`; `roundoff` replaces it where it is larger.
    """
    error = max(rounding_error(dtype), roundoff or 0.0)
    return mean_square * (error * (math.sqrt(shape[0]) + math.sqrt(shape[1]))) ** 2


def rounding_error(dtype: torch.dtype) -> float:
    """Relative root-mean-square error of weights stored in a floating-point format with unit roundoff u.

    Rounding alone gives 0.6 u; the arithmetic that made the weights (a low-rank product, an orthogonalisation), in
    float32 at best unless they are stored in float64, gives about 4 u of its own.
    """
    unit_roundoff = torch.finfo(dtype).eps / 2
    return max(0.6 * unit_roundoff, 4 * min(unit_roundoff, _EPS32 / 2))


def _zero_floor(path: SpectrumPath, order: int) -> float:
    """Return the fraction of lambda_max at or below which the path cannot tell eigenvalues from zero."""
    if path == "gram-float32":
        return order * _EPS32
    if path == "gram-float64":
        return order * _EPS64
    return (order * _EPS64) ** 2


def scaling_exponent(peak: float, path: SpectrumPath) -> int:
    """Power of two to divide matrices with this largest absolute element by, so that their squares neither overflow
    nor vanish on this path; 0 in the usual case.
    """
    exponent = math.frexp(peak)[1]
    return exponent if abs(exponent) > _SAFE_EXPONENT[path] else 0


def in_float32_range(peak: float) -> bool:
    """Return whether matrices with this largest absolute element can be squared and summed in float32 as they are."""
    return scaling_exponent(peak, "gram-float32") == 0


def peak_of(matrices: Sequence[torch.Tensor]) -> float:
    """Return the largest absolute element of several matrices; NaN or infinity if there is one."""
    # max() passes over a NaN that is not the first.
    return max(map(_max_abs, matrices), key=lambda peak: math.inf if math.isnan(peak) else peak)


def _max_abs(matrix: torch.Tensor) -> float:
    if matrix.numel() == 0:
        return 0.0
    if matrix.dtype.itemsize == 1:  # reductions do not know float8
        matrix = matrix.to(torch.float32)
    low, high = torch.aminmax(matrix)
    return max(abs(float(low)), abs(float(high))) if not torch.isnan(low) else math.nan


def _short_side_blocks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """Slices [n, <= block] of the short-side-first matrix, so that conversion copies stay small."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    yield from wide.split(max(wide.shape[0], _MIN_BLOCK), dim=1)


def _eigenvalues_cpu(matrix: torch.Tensor, path: SpectrumPath) -> tuple[npt.NDArray[Any], Solver]:
    """Return the eigenvalues [n] of one matrix on the CPU, not sorted out yet, and who computed them."""
    if path == "svd-float64":
        return squared_singular_values(matrix).numpy(), "torch"
    dtype = torch.float32 if path == "gram-float32" else torch.float64
    try:
        # The blocks of the Gram matrix are gone when the solver runs.
        return symmetric_eigenvalues(gram_matrix(block.to(dtype).numpy() for block in _short_side_blocks(matrix)))
    except np.linalg.LinAlgError:
        # The symmetric solvers practically never fail on finite input; the SVD is the independent way out.
        return squared_singular_values(matrix).numpy(), "torch"


def _eigenvalues_device(stack: torch.Tensor, path: SpectrumPath) -> tuple[npt.NDArray[Any], Solver]:
    """Return the eigenvalues of a stack [batch, rows, columns] on an accelerator, flattened, and who computed them."""
    if stack.device.type == "mps" and path != "gram-float32":
        # Metal has no float64.
        found = [_eigenvalues_cpu(matrix.cpu(), path) for matrix in stack]
        return np.concatenate([eigenvalues for eigenvalues, _ in found]), found[-1][1]
    if path == "svd-float64":
        return accelerator_svd(stack), "torch"
    return accelerator_eigenvalues(stack, dtype=torch.float32 if path == "gram-float32" else torch.float64)
