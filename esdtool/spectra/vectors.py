"""Singular vectors: how many channels carry each, against those of a random matrix, and which carry the localised ones.

The inverse participation ratio of a unit vector v is IPR = sum v_i^4: 1 where one channel carries it, 1 / n where all n
do alike. The singular vectors of a Gaussian matrix are uniform on the sphere, for which

    E[IPR] = 3 / (n + 2),    Var[IPR] = 24 (n - 1) / ((n + 2)^2 (n + 4) (n + 6))

(moments of the sphere; the limit of large n is the law of Porter and Thomas 1956). A vector is called localised if its
ratio exceeds what no vector of such a matrix reaches, but for one matrix in a thousand: the mean, three standard
deviations, and the fourth power of the largest element that comes that often.

Vectors come from the Gram matrix on the short side in float64, G = A A^T = U diag(lambda) U^T; those of the long side
are A^T u / sigma, taken in blocks of the long side, so that no more than two matrices of the order of G stay in memory
beside a block. A sign changes no square. Vectors of equal eigenvalues are arbitrary within their space, so a pair
whose eigenvalue is nearer to a neighbour than rounding can tell apart is left out, as are those of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch

from esdtool.spectra.accelerator import gram_matrices
from esdtool.spectra.cache import SpectrumCache, note_key
from esdtool.spectra.lapack import gram_matrix
from esdtool.spectra.spectrum import Spectrum, peak_of, scaling_exponent, times_power_of_two
from esdtool.spectra.vector_records import (
    MOST_CHANNELS,
    MOST_VECTORS,
    ChannelShare,
    LocalisedVector,
    VectorGroup,
    Vectors,
    VectorSide,
)

VERSION = 1
"""Raise it when the numbers change for the same weights: cached results are then computed again."""

_BLOCK = 512
"""Positions of the long side that are multiplied at a time."""

_EPS, _TINY = float(np.finfo(np.float64).eps), float(np.finfo(np.float64).tiny)

_LEAST_GAP = 400 * _EPS
"""Distance of neighbouring eigenvalues, over the largest, from which their vectors are told apart: the eigenvalues have
an error of 4 units, and the vectors then one of 1 %."""

_RARE = 1e-3
"""Share of random matrices with a vector above the ceiling."""

Floats = npt.NDArray[np.float64]


def ipr_random(dimension: int) -> float:
    """Return the expected inverse participation ratio of a random unit vector of real numbers.

    >>> ipr_random(1), ipr_random(98)
    (1.0, 0.03)
    """
    return 3 / (dimension + 2)


def ipr_ceiling(dimension: int, count: int) -> float:
    """Return the inverse participation ratio that none of `count` random vectors reaches, but once in a thousand times.

    Args:
        dimension: elements of each vector.
        count: number of vectors.
    """
    n = dimension
    deviation = math.sqrt(24 * (n - 1) / ((n + 2) ** 2 * (n + 4) * (n + 6)))
    largest = NormalDist().inv_cdf(_RARE / (2 * n * max(count, 1)))
    return ipr_random(n) + 3 * deviation + (largest**2 / n) ** 2


def known_vectors(
    read: Callable[[], Sequence[torch.Tensor]],
    spectrum: Spectrum,
    *,
    xmin: float,
    scale: float,
    device: torch.device | None,
    cache: SpectrumCache | None,
    content: str | None,
) -> Vectors:
    """Find the statistics of a module's vectors in the cache, or compute them.

    Args:
        read: gives the matrices; called only if the cache does not have the result.
        spectrum: as of `find_vectors`, as are the arguments not named here.
        xmin: where the tail begins.
        scale: factor of the eigenvalues.
        device: where to compute.
        cache: where results are kept.
        content: `content_hash` of the matrices, where there is a cache.
    """
    if cache is None or content is None:
        return find_vectors(read(), spectrum, xmin=xmin, scale=scale, device=device)
    kind = "cpu" if device is None else device.type
    # The spectrum's last digits differ between solvers, and move neither the length of the tail nor the floor.
    floor = f"{spectrum.storage_floor:.6g}"
    key = note_key("vectors", VERSION, content, scale, _num_tail(spectrum, xmin), floor, spectrum.exponent, kind)
    text = cache.load_note(key)
    if text is not None:
        with suppress(ValueError):
            return Vectors.model_validate_json(text)
    found = find_vectors(read(), spectrum, xmin=xmin, scale=scale, device=device)
    cache.save_note(key, found.model_dump_json())
    return found


def find_vectors(
    matrices: Sequence[torch.Tensor],
    spectrum: Spectrum,
    *,
    xmin: float,
    scale: float = 1.0,
    device: torch.device | None = None,
) -> Vectors:
    """Compute the statistics of a module's singular vectors.

    Args:
        matrices: [rows, columns] each, of one shape, floating point, finite, not all zero.
        spectrum: their pooled eigenvalues.
        xmin: the smallest eigenvalue of the tail, in the units of `spectrum.eigenvalues`.
        scale: factor of the eigenvalues that `spectrum` has already.
        device: where to compute; default the matrices' own.
    """
    rows, columns = matrices[0].shape
    exponent = scaling_exponent(peak_of(matrices), "svd-float64")
    factor = math.ldexp(scale, 2 * exponent - spectrum.exponent)
    ceilings = [ipr_ceiling(side, min(rows, columns)) for side in (rows, columns)]
    found = [
        _decompose(
            times_power_of_two(matrix, -exponent) if exponent else matrix,
            floor=spectrum.storage_floor / factor,
            ceilings=ceilings,
            device=device or matrix.device,
        )
        for matrix in matrices
    ]
    pooled = np.sort(np.concatenate([each.eigenvalues for each in found]))[::-1]
    first_of_tail = float(pooled[_num_tail(spectrum, xmin) - 1])
    sides = [
        _side(
            (rows, columns)[axis],
            found,
            axis=axis,
            ceiling=ceilings[axis],
            first_of_tail=first_of_tail,
            unscaled=lambda eigenvalue: spectrum.unscaled(eigenvalue * factor),
        )
        for axis in (0, 1)
    ]
    determined = sum(int(each.determined.sum()) for each in found)
    return Vectors(
        num_vectors=determined,
        num_undetermined=pooled.size - determined,
        rows=sides[0],
        columns=sides[1],
    )


@dataclass(frozen=True, kw_only=True)
class _Decomposed:
    """The singular vectors of one matrix in numbers."""

    eigenvalues: Floats
    """[n], descending, of the matrix as it was multiplied."""
    determined: npt.NDArray[np.bool_]
    """[n]: whether the vectors are told from their neighbours and from zero."""
    ipr: tuple[Floats, Floats]
    """[n] each, of the left and of the right vectors."""
    shares: tuple[dict[int, Floats], dict[int, Floats]]
    """The squared elements of the most localised vectors of each side, by their position."""


def _decompose(matrix: torch.Tensor, *, floor: float, ceilings: Sequence[float], device: torch.device) -> _Decomposed:
    """Decompose a matrix [rows, columns]; keep each vector's ratio, and all elements of the most localised ones."""
    transposed = matrix.shape[0] > matrix.shape[1]
    # Metal has no float64.
    wide = (matrix.T if transposed else matrix).to("cpu" if device.type == "mps" else device)
    ascending, basis = _eigenvectors(wide)
    eigenvalues, basis = ascending.cpu().numpy()[::-1].clip(min=0.0), basis.flip(1)
    determined = _determined(eigenvalues, floor)
    short_side = int(transposed)
    ratios = [_ratios_of_short_side(basis), _ratios_of_long_side(basis, wide)]
    ceiling = [ceilings[short_side], ceilings[1 - short_side]]
    chosen = []
    for ratio, limit in zip(ratios, ceiling, strict=True):
        above = np.flatnonzero(determined & (ratio > limit))
        chosen.append(above[np.argsort(-ratio[above], kind="stable")[:MOST_VECTORS]].tolist())
    shares = [
        dict(zip(chosen[0], basis[:, chosen[0]].T.square().cpu().numpy(), strict=True)),
        dict(zip(chosen[1], _shares_of_long_side(basis[:, chosen[1]], wide), strict=True)),
    ]
    return _Decomposed(
        eigenvalues=eigenvalues,
        determined=determined,
        ipr=(ratios[short_side], ratios[1 - short_side]),
        shares=(shares[short_side], shares[1 - short_side]),
    )


def _ratios_of_short_side(basis: torch.Tensor) -> Floats:
    """Return the ratios [n] of unit vectors, the columns of [n, n]."""
    parts = [block.square().square_().sum(dim=0) for block in basis.split(_BLOCK, dim=1)]
    return torch.cat(parts).cpu().numpy()


def _ratios_of_long_side(basis: torch.Tensor, wide: torch.Tensor) -> Floats:
    """Return the ratios [n] of the vectors of the other side, from the short side's and the matrix [n, m]."""
    squares, fourths = (basis.new_zeros(basis.shape[1]) for _ in range(2))
    for _, block in _blocks(wide):
        image = (basis.T @ block).square_()  # [n, k]: squares of sigma v
        squares += image.sum(dim=1)
        fourths += image.square_().sum(dim=1)
    # Zero for pairs without a second vector, which are not counted.
    return (fourths / squares.square().clamp_(min=_TINY)).cpu().numpy()


def _shares_of_long_side(chosen: torch.Tensor, wide: torch.Tensor) -> Floats:
    """Return the squared elements [k, m] of some vectors of the other side, from the short side's [n, k]."""
    shares = np.empty((chosen.shape[1], wide.shape[1]))
    if shares.size:
        for start, block in _blocks(wide):
            shares[:, start : start + block.shape[1]] = (chosen.T @ block).square_().cpu().numpy()
        shares /= shares.sum(axis=1, keepdims=True)
    return shares


def _eigenvectors(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvalues [n], ascending, and the eigenvectors [n, n] of the Gram matrix of [n, m] in float64."""
    if wide.device.type != "cpu":
        # What the accelerator's solver fails on, the CPU computes.
        with suppress(RuntimeError):
            eigenvalues, basis = torch.linalg.eigh(gram_matrices(wide[None], dtype=torch.float64)[0])
            if bool(torch.isfinite(basis).all()):
                return eigenvalues, basis
        eigenvalues, basis = _eigenvectors(wide.cpu())
        return eigenvalues, basis.to(wide.device)
    # torch reads the lower triangle, and the Gram matrix has its upper one.
    gram = gram_matrix(block.numpy() for _, block in _blocks(wide))
    eigenvalues, basis = torch.linalg.eigh(torch.from_numpy(gram.T))
    return eigenvalues, basis


def _blocks(wide: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield slices [n, k] of the long side in float64, each with its first position."""
    for start in range(0, wide.shape[1], _BLOCK):
        yield start, wide[:, start : start + _BLOCK].to(torch.float64)


def _determined(eigenvalues: Floats, floor: float) -> npt.NDArray[np.bool_]:
    """Tell which of descending eigenvalues have vectors of their own: neither zero nor equal to a neighbour."""
    largest = float(eigenvalues[0])
    gaps = np.concatenate([[np.inf], -np.diff(eigenvalues), [np.inf]])
    apart = np.minimum(gaps[:-1], gaps[1:]) > _LEAST_GAP * largest
    found: npt.NDArray[np.bool_] = apart & (eigenvalues > max(floor, eigenvalues.size * _EPS * largest))
    return found


def _side(
    dimension: int,
    found: Sequence[_Decomposed],
    *,
    axis: int,
    ceiling: float,
    first_of_tail: float,
    unscaled: Callable[[float], float | None],
) -> VectorSide:
    """Gather the vectors of one side of all matrices."""
    eigenvalues = np.concatenate([each.eigenvalues[each.determined] for each in found])
    ratios = np.concatenate([each.ipr[axis][each.determined] for each in found])
    in_tail = eigenvalues >= first_of_tail
    listed = [
        LocalisedVector(
            matrix=number,
            rank=position + 1,
            eigenvalue=unscaled(float(each.eigenvalues[position])),
            in_tail=bool(each.eigenvalues[position] >= first_of_tail),
            ipr=float(each.ipr[axis][position]),
            localisation=float(_localisation(each.ipr[axis][position], dimension)),
            channels=_channels(shares),
        )
        for number, each in enumerate(found)
        for position, shares in each.shares[axis].items()
    ]
    listed.sort(key=lambda vector: -vector.ipr)
    return VectorSide(
        dimension=dimension,
        ipr_random=ipr_random(dimension),
        ipr_ceiling=ceiling,
        bulk=_group(ratios[~in_tail], dimension, ceiling),
        tail=_group(ratios[in_tail], dimension, ceiling),
        most_localised=tuple(listed[:MOST_VECTORS]),
    )


def _group(ratios: Floats, dimension: int, ceiling: float) -> VectorGroup | None:
    if ratios.size == 0:
        return None
    return VectorGroup(
        count=ratios.size,
        ipr=float(ratios.mean()),
        ipr_max=float(ratios.max()),
        localisation=float(_localisation(ratios, dimension).mean()),
        num_localised=int((ratios > ceiling).sum()),
    )


def _localisation(ratios: Floats, dimension: int) -> Floats:
    """Bring ratios to 0 for those of a random vector and 1 for a single channel."""
    expected = ipr_random(dimension)
    return np.clip((ratios - expected) / max(1 - expected, _EPS), 0.0, 1.0)


def _channels(shares: Floats) -> tuple[ChannelShare, ...]:
    """Return the largest channels of a vector, until they hold half of it."""
    order = np.argsort(-shares, kind="stable")[:MOST_CHANNELS]
    needed = int(np.searchsorted(np.cumsum(shares[order]), 0.5)) + 1
    return tuple(ChannelShare(index=int(index), share=float(shares[index])) for index in order[:needed])


def _num_tail(spectrum: Spectrum, xmin: float) -> int:
    """Count the eigenvalues of the tail, at least one."""
    return max(1, int((spectrum.eigenvalues >= xmin).sum()))
