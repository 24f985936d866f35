"""Correlation traps: eigenvalues above the bulk that survive a shuffle of a matrix's elements.

A shuffle destroys everything but the distribution of the elements, so what is left of the spectrum's spikes comes from
single elements, or from their mean. With the elements' mean mu and the variance s^2 of the others, an element of
deviation theta = w - mu puts an eigenvalue of the shuffled matrix [N, M] at

    (theta^2 + s^2 N) (theta^2 + s^2 M) / theta^2    if |theta| > s (N M)^(1/4),

and hides in the bulk otherwise; the mean does the same with theta = |mu| sqrt(N M). Both are perturbations of rank one
of a matrix of noise (Benaych-Georges and Nadakuditi 2012, section 3.1). A trap is an eigenvalue that also exceeds what
noise reaches once in a thousand matrices, as `num_spikes` counts it. So traps are counted in passes over the elements,
without a decomposition and without a draw, and each has its row and column. The law is exact for few such elements;
where they are so many that they share rows and columns after a shuffle, it counts more than a shuffle shows.
WeightWatcher draws instead, and `drawn_traps` does so, too, as a check.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from esdtool.spectra.cache import SpectrumCache, note_key
from esdtool.spectra.measure import MeasuredSpectrum
from esdtool.spectra.measures.mp_bulk import mp_bulk
from esdtool.spectra.spectrum import compute_spectrum, peak_of
from esdtool.spectra.tracy_widom import noise_ceiling
from esdtool.spectra.trap_records import MOST_ELEMENTS, MOST_LINES, TrapElement, TrapLine, Traps

VERSION = 2
"""Raise it when the numbers change for the same weights: cached results are then computed again."""

_BLOCK = 2**17
"""Elements that are converted to float64 at a time: what a core keeps at hand between the passes over them."""

_AHEAD = 0.7
"""Share of the threshold from which elements are collected: it falls as outliers are left out, and rarely by more."""

_CONSTANT = 1e-7
"""Deviation over mean of elements that are equal up to rounding."""

_USUAL_EXPONENT = 400
"""Largest |log2 max|W|| of which squares and their sums stay within float64."""


def find_traps(matrices: Sequence[torch.Tensor], *, scale: float = 1.0) -> Traps:
    """Count the traps of a module by the law, in passes over the elements.

    Args:
        matrices: [rows, columns] each, of one shape, floating point, finite, not all zero.
        scale: factor of the eigenvalues.
    """
    found = [_outliers(matrix) for matrix in matrices]
    listed: list[tuple[float, TrapElement]] = []
    for number, each in enumerate(found):
        for position in np.argsort(-np.abs(each.values - each.mean), kind="stable")[:MOST_ELEMENTS]:
            deviation = float(each.values[position]) - each.mean
            place = (deviation**2 + each.variance * each.shape[0]) * (1 + each.variance * each.shape[1] / deviation**2)
            element = TrapElement(
                matrix=number,
                row=int(each.rows[position]),
                column=int(each.columns[position]),
                value=math.ldexp(float(each.values[position]), each.exponent),
                eigenvalue=_times(scale * place, 2 * each.exponent),
            )
            listed.append((math.ldexp(abs(deviation), each.exponent), element))
    listed.sort(key=lambda entry: -entry[0])
    return Traps(
        from_elements=sum(each.values.size for each in found),
        from_mean=sum(each.mean_is_trap for each in found),
        elements=tuple(element for _, element in listed[:MOST_ELEMENTS]),
        rows=_lines([each.rows for each in found]),
        columns=_lines([each.columns for each in found]),
    )


def known_traps(
    read: Callable[[], Sequence[torch.Tensor]], *, scale: float, cache: SpectrumCache | None, content: str | None
) -> Traps:
    """Find the traps of a module in the cache, or in its elements.

    Args:
        read: gives the matrices, [rows, columns] each, of one shape, floating point, finite, not all zero; called only
            if the cache does not have the result.
        scale: factor of the eigenvalues.
        cache: where results are kept.
        content: `content_hash` of the matrices, where there is a cache.
    """
    if cache is None or content is None:
        return find_traps(read(), scale=scale)
    key = note_key("traps", VERSION, content, scale)
    text = cache.load_note(key)
    if text is not None:
        with suppress(ValueError):
            return Traps.model_validate_json(text)
    found = find_traps(read(), scale=scale)
    cache.save_note(key, found.model_dump_json())
    return found


def drawn_traps(matrices: Sequence[torch.Tensor], *, seed: int, name: str, device: torch.device | None = None) -> int:
    """Count the spikes that remain after one shuffle of each matrix's elements.

    Args:
        matrices: [rows, columns] each, of one shape, floating point, finite, not all zero.
        seed: of the draw.
        name: of the module, so that each has a draw of its own, in whatever order they are computed.
        device: where to compute; default the matrices' own.
    """
    generator = torch.Generator().manual_seed((seed << 32) % 2**63 + zlib.crc32(name.encode()))
    shuffled = [
        matrix.cpu().reshape(-1)[torch.randperm(matrix.numel(), generator=generator)].reshape(matrix.shape)
        for matrix in matrices
    ]
    spectrum = compute_spectrum(shuffled, "gram-float64", device=device or matrices[0].device)
    rows, columns = matrices[0].shape
    spikes = mp_bulk(MeasuredSpectrum(spectrum=spectrum, shape=(rows, columns), num_matrices=len(matrices)))
    found = spikes["num_spikes"]
    # A shuffled matrix without a bulk has a few elements that are not zero: each is a spike.
    return int((spectrum.eigenvalues > 0).sum()) if found is None else int(found)


@dataclass(frozen=True, kw_only=True)
class _Outliers:
    """The elements of one matrix that make traps, and the statistics of the others."""

    shape: tuple[int, int]
    exponent: int
    """Values, mean and variance belong to the matrix over 2^`exponent`."""
    mean: float
    variance: float
    mean_is_trap: bool
    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    """[k] each: the elements that make traps."""


def _outliers(matrix: torch.Tensor) -> _Outliers:
    """Find the elements that exceed the threshold of the others, by leaving out more until none is left to leave out.

    One outlier raises the variance that another is compared with, so the threshold falls as they are left out.
    """
    rows, columns = matrix.shape
    # Only float64 has numbers whose squares it does not have.
    peak = math.frexp(peak_of([matrix]))[1] if matrix.dtype == torch.float64 else 0
    exponent = peak if abs(peak) > _USUAL_EXPONENT else 0
    total, squares, low, high = 0.0, 0.0, math.inf, -math.inf
    for _, block in _blocks(matrix, exponent):
        low, high = min(low, float(block.min())), max(high, float(block.max()))
        total += float(torch.from_numpy(block).sum())
        # Not by BLAS, whose last digits depend on its threads.
        squares += float(np.einsum("i,i->", block, block))
    count = rows * columns
    least_deviation = _least_deviation(rows, columns)
    places, values = np.zeros(0, dtype=np.int64), np.zeros(0)
    large = _Large(matrix, exponent)
    while True:
        kept = count - values.size
        mean = (total - float(values.sum())) / kept
        variance = max((squares - float(values @ values)) / kept - mean * mean, 0.0)
        threshold = math.sqrt(variance) * least_deviation
        if variance <= (_CONSTANT * mean) ** 2:
            # All other elements are equal up to rounding: there is no noise that an element could exceed.
            return _Outliers(
                shape=(rows, columns),
                exponent=exponent,
                mean=mean,
                variance=variance,
                mean_is_trap=False,
                rows=places[:0],
                columns=places[:0],
                values=values[:0],
            )
        if max(high - mean, mean - low) <= threshold:
            break
        more_places, more_values = large.beyond(mean, threshold)
        settled = more_values.size <= values.size
        if not settled:
            places, values = more_places, more_values
        if settled or 2 * values.size > count:
            break
    return _Outliers(
        shape=(rows, columns),
        exponent=exponent,
        mean=mean,
        variance=variance,
        mean_is_trap=abs(mean) * count**0.5 > threshold,
        rows=places // columns,
        columns=places % columns,
        values=values,
    )


def _least_deviation(rows: int, columns: int) -> float:
    """Return the deviation, in standard deviations of the others, that puts an eigenvalue at the noise ceiling."""
    above = noise_ceiling(rows, columns) - rows - columns
    return math.sqrt((above + math.sqrt(max(above**2 - 4 * rows * columns, 0.0))) / 2)


def _blocks(matrix: torch.Tensor, exponent: int) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """Yield runs of rows, flat in float64 over 2^`exponent`, each with the number of its first row.

    All runs share their memory: one lasts until the next.
    """
    rows, columns = matrix.shape
    step = min(rows, max(1, _BLOCK // columns))
    buffer = torch.empty(step, columns, dtype=torch.float64)
    for start in range(0, rows, step):
        block = buffer[: min(step, rows - start)]
        block.copy_(matrix[start : start + step])
        yield start, (block if exponent == 0 else torch.ldexp(block, torch.tensor(-exponent))).numpy().reshape(-1)


class _Large:
    """The large elements of a matrix, which are looked up in a pass over all, and again as the threshold falls."""

    def __init__(self, matrix: torch.Tensor, exponent: int) -> None:
        self._matrix, self._exponent = matrix, exponent
        self._center, self._reach = 0.0, math.inf
        self._places, self._values = np.zeros(0, dtype=np.int64), np.zeros(0)

    def beyond(self, mean: float, threshold: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the flat positions and the values of the elements further from the mean than the threshold."""
        if threshold - abs(mean - self._center) < self._reach:
            self._collect(mean, _AHEAD * threshold)
        is_beyond = np.abs(self._values - mean) > threshold
        return self._places[is_beyond], self._values[is_beyond]

    def _collect(self, center: float, reach: float) -> None:
        places, values = [self._places[:0]], [self._values[:0]]
        low, high = center - reach, center + reach
        for start, block in _blocks(self._matrix, self._exponent):
            if block.min() >= low and block.max() <= high:
                continue
            found = np.flatnonzero((block < low) | (block > high))
            places.append(found + start * self._matrix.shape[1])
            values.append(block[found])
        self._places, self._values = np.concatenate(places), np.concatenate(values)
        self._center, self._reach = center, reach


def _lines(indices: Sequence[npt.NDArray[np.int64]]) -> tuple[TrapLine, ...]:
    """Count elements by their row or column, and return those with the most."""
    if not any(each.size for each in indices):
        return ()
    lines, counts = np.unique(np.concatenate(indices), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_LINES]
    return tuple(TrapLine(index=int(lines[position]), count=int(counts[position])) for position in order)


def _times(value: float, exponent: int) -> float | None:
    """Multiply by 2^`exponent`; None where float64 has no such number."""
    try:
        product = math.ldexp(value, exponent)
    except OverflowError:
        return None
    return product if product >= sys.float_info.min and math.isfinite(product) else None
