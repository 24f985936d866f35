"""Two versions of one matrix, and their singular vectors as far as comparisons need them.

With A the base and B the other, and the short side first, everything comes from three products of the order of the
short side, taken in float64 slice by slice: A A^T, B B^T and A B^T. The eigenvectors of the first two are the singular
vectors of the short side. Those of the long side are never formed: their inner products are
S_A^-1 U_A^T (A B^T) U_B S_B^-1. An eigenvalue of a Gram matrix has an absolute error of about 1e-16 of the largest, so
that singular values below 1e-6 of the largest are not resolved, and their vectors take no part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch

from esdtool.spectra.options import PairOptions
from esdtool.spectra.spectrum import peak_of

_RESOLVED = 1e-12
"""Eigenvalues of at most this share of the largest take no part."""

_GAP = 1e-10
"""Eigenvalues that differ by at most this share of the largest count as equal: their vectors are any of a space."""

_BLOCK = 2048
"""Shortest slice of the long side that is converted and multiplied at a time."""


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """The resolved singular values of a matrix, and its singular vectors of the short side."""

    eigenvalues: torch.Tensor
    """[r] squared singular values, descending, float64; r is 0 for a matrix of zeros."""
    short: torch.Tensor
    """[short side, r], orthonormal columns."""

    @property
    def rank(self) -> int:
        """Number r of resolved singular values."""
        return self.eigenvalues.numel()

    @property
    def effective_rank(self) -> int:
        """Return exp of the entropy of lambda / sum lambda, rounded (Roy and Vetterli 2007); 0 without any."""
        if self.rank == 0:
            return 0
        shares = self.eigenvalues / self.eigenvalues.sum()
        return min(self.rank, round(math.exp(-float((shares * shares.log()).sum()))))

    def is_separate(self, count: int) -> bool:
        """Tell whether the first `count` vectors span a definite space: the next singular value is smaller."""
        if not 0 < count <= self.rank:
            return False
        after = float(self.eigenvalues[count]) if count < self.rank else 0.0
        return float(self.eigenvalues[count - 1]) - after > _GAP * float(self.eigenvalues[0])

    @property
    def clusters(self) -> torch.Tensor:
        """[r] int64: number of the group of equal singular values that each belongs to."""
        steps = self.eigenvalues[:-1] - self.eigenvalues[1:] > _GAP * self.eigenvalues[:1]
        return torch.cat([torch.zeros_like(self.eigenvalues[:1], dtype=torch.int64), steps.cumsum(0)])


@dataclass(frozen=True, kw_only=True)
class MatrixPair:
    """Two matrices of one shape, floating point."""

    base: torch.Tensor
    """[rows, columns]: the one to compare with."""
    other: torch.Tensor
    """[rows, columns]."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where products and eigenvectors are computed; the CPU where the device has no float64."""
    options: PairOptions = field(default_factory=PairOptions)

    @cached_property
    def is_finite(self) -> bool:
        """Whether all elements of both are."""
        return math.isfinite(self._peaks[0]) and math.isfinite(self._peaks[1])

    @property
    def rows_are_short(self) -> bool:
        """Whether the vectors of the short side are the left ones."""
        return self.base.shape[0] <= self.base.shape[1]

    @cached_property
    def norms(self) -> tuple[float, float]:
        """Frobenius norms of the difference and of the base, over one power of two."""
        exponent = _exponent(max(self._peaks))
        step = max(1, _BLOCK * _BLOCK // max(1, self.base.shape[1]))
        difference = base = 0.0
        for start in range(0, self.base.shape[0], step):
            old = _scaled(self.base[start : start + step], exponent)
            new = _scaled(self.other[start : start + step], exponent)
            base += float(old.square().sum())
            difference += float((new - old).square_().sum())
        return math.sqrt(difference), math.sqrt(base)

    @cached_property
    def grams(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A A^T, B B^T and A B^T, [short side, short side] float64 each; each matrix over a power of two of its own."""
        exponents = [_exponent(peak) for peak in self._peaks]
        order = min(self.base.shape)
        base, other, cross = (torch.zeros(order, order, dtype=torch.float64, device=self._device) for _ in range(3))
        for old, new in self._slices():
            left, right = (
                _scaled(part.to(self._device), exponent) for part, exponent in zip((old, new), exponents, strict=True)
            )
            base.addmm_(left, left.T)
            other.addmm_(right, right.T)
            cross.addmm_(left, right.T)
        return base, other, cross

    @cached_property
    def base_vectors(self) -> Vectors:
        """The base's."""
        return _vectors(self.grams[0])

    @cached_property
    def other_vectors(self) -> Vectors:
        """The other's."""
        return self.base_vectors if self.are_equal else _vectors(self.grams[1])

    @cached_property
    def are_equal(self) -> bool:
        """Whether both are equal to the last bit."""
        return self._peaks[0] == self._peaks[1] and bool(torch.equal(self.base, self.other))

    def products(self, *, left: bool, of_base: int | None = None, of_other: int | None = None) -> torch.Tensor:
        """Return the inner products of singular vectors, those of the base in the rows.

        Args:
            left: of the left singular vectors, else of the right ones.
            of_base: how many vectors of the base, the first; default all that are resolved.
            of_other: how many of the other.
        """
        base, other = self.base_vectors, self.other_vectors
        ours, theirs = base.short[:, :of_base], other.short[:, :of_other]
        if left == self.rows_are_short:
            return ours.T @ theirs
        sizes = base.eigenvalues[:of_base].sqrt()[:, None] * other.eigenvalues[:of_other].sqrt()
        return ours.T @ (self.grams[2] @ theirs) / sizes

    @cached_property
    def _peaks(self) -> tuple[float, float]:
        return peak_of([self.base]), peak_of([self.other])

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def _slices(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield slices [short side, <= block] of both, the short side first."""
        base, other = (self.base, self.other) if self.rows_are_short else (self.base.T, self.other.T)
        block = max(base.shape[0], _BLOCK)
        return zip(base.split(block, dim=1), other.split(block, dim=1), strict=True)


def _vectors(gram: torch.Tensor) -> Vectors:
    try:
        eigenvalues, vectors = torch.linalg.eigh(gram)
    except RuntimeError:  # an accelerator's solver that fails, or has no memory
        eigenvalues, vectors = (part.to(gram.device) for part in torch.linalg.eigh(gram.cpu()))
    largest = float(eigenvalues[-1]) if eigenvalues.numel() else 0.0
    rank = int((eigenvalues > max(_RESOLVED * largest, 0.0)).sum())
    return Vectors(eigenvalues=eigenvalues.flip(0)[:rank].contiguous(), short=vectors.flip(1)[:, :rank].contiguous())


def _exponent(peak: float) -> int:
    """Return the power of two of a largest element, or 0 where its squares are in no danger."""
    exponent = math.frexp(peak)[1]
    return exponent if abs(exponent) > 400 else 0


def _scaled(matrix: torch.Tensor, exponent: int) -> torch.Tensor:
    """Divide a matrix by 2^exponent in float64, exactly but for what vanishes."""
    wide = matrix.to(torch.float64)
    if exponent == 0:
        return wide
    half = -exponent // 2
    return wide * math.ldexp(1.0, half) * math.ldexp(1.0, -exponent - half)
