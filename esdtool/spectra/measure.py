"""Define a measure of a spectrum: the form of every file in `esdtool.spectra.measures`.

The documents have a key for each quantity, and are read where neither torch nor numpy is wanted: a measure imports
what it computes with when it computes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from esdtool.spectra import measures

if TYPE_CHECKING:
    from esdtool.spectra.slq import SlqEstimate
    from esdtool.spectra.spectrum import Spectrum
    from esdtool.spectra.tail import TailFit, Vector

Number = float | int | None
"""The value of a quantity; None where it is not known."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One number that a measure gives of each module."""

    name: str
    """Key in the JSON and column of the CSV."""
    title: str
    """Heading in tables for people."""
    formula: str
    """What it is, as the documentation and the JSON Schema say it; no full stop at the end."""
    source: str
    """Paper, or what else defines it."""
    unit: str = ""
    """Unit in terms of the weights ("weight", "weight^2"); empty for a number without one."""
    whole: bool = False
    """Whether it is a count."""

    @property
    def description(self) -> str:
        """The description in the JSON Schema."""
        unit = f" Unit: {self.unit}." if self.unit else ""
        return f"{self.formula}.{unit} Source: {self.source}."


@dataclass(frozen=True, kw_only=True)
class MeasuredSpectrum:
    """The spectrum that a measure is computed from, and the matrix that it belongs to."""

    spectrum: Spectrum
    """The eigenvalues, [n] with n = min(shape) * num_matrices, and their accuracy."""
    shape: tuple[int, int]
    """(rows, columns) of each matrix."""
    num_matrices: int = 1
    """Matrices in the pool (kernel positions of a convolution)."""
    rank: int | None = None
    """Largest possible rank of a low-rank update; None for an ordinary matrix."""
    fits: Mapping[str, TailFit | None] = field(default_factory=dict)
    """Tails that are known already, by their estimators."""

    @property
    def above_rounding(self) -> Vector:
        """The eigenvalues [n], with 0 in the place of those that can be nothing but the rounding of the weights."""
        import numpy as np

        eigenvalues = self.spectrum.eigenvalues
        return np.where(eigenvalues > self.spectrum.storage_floor, eigenvalues, 0.0)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Several quantities that one computation gives."""

    quantities: tuple[Quantity, ...]
    """What it gives, in the order of the output."""
    compute: Callable[[MeasuredSpectrum], Mapping[str, Number]]
    """Compute all quantities, by their names. The largest eigenvalue is positive."""
    estimate: Callable[[SlqEstimate, tuple[int, int]], Mapping[str, Number]] | None = None
    """Compute what can be said of one matrix of a shape without its eigenvalues; None: nothing."""
    of_full_rank: bool = False
    """Whether it compares with a random matrix, which a low-rank update is not: those get None."""


@functools.cache
def load_measures() -> tuple[Measure, ...]:
    """Import all measures, in the order of their names."""
    return tuple(importlib.import_module(f"{measures.__name__}.{name}").MEASURE for name in measures.MEASURE_NAMES)


@functools.cache
def all_quantities() -> tuple[Quantity, ...]:
    """Return the quantities of all measures, in the order of the output."""
    return tuple(quantity for measure in load_measures() for quantity in measure.quantities)


def measure_spectrum(measured: MeasuredSpectrum) -> dict[str, Number]:
    """Compute every quantity of one module, by its name.

    Args:
        measured: the spectrum of the module, whose largest eigenvalue is positive.
    """
    values: dict[str, Number] = dict.fromkeys(quantity.name for quantity in all_quantities())
    for measure in load_measures():
        if measured.rank is None or not measure.of_full_rank:
            values |= measure.compute(measured)
    return values


def measure_estimate(estimate: SlqEstimate, shape: tuple[int, int]) -> dict[str, Number]:
    """Compute the quantities that an estimate without eigenvalues allows, by name; the others are None.

    Args:
        estimate: of one matrix.
        shape: (rows, columns) of the matrix.
    """
    values: dict[str, Number] = dict.fromkeys(quantity.name for quantity in all_quantities())
    for measure in load_measures():
        if measure.estimate is not None:
            values |= measure.estimate(estimate, shape)
    return values
