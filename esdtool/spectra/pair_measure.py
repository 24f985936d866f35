"""Define a measure of two versions of one matrix: the form of every file in `esdtool.spectra.pairs`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esdtool.spectra import pairs
from esdtool.spectra.measure import Number, Quantity

if TYPE_CHECKING:
    from esdtool.spectra.matrix_pair import MatrixPair


@dataclass(frozen=True, kw_only=True)
class PairMeasure:
    """Several quantities that one computation gives of two matrices of one shape."""

    quantities: tuple[Quantity, ...]
    """What it gives, in the order of the output."""
    compute: Callable[[MatrixPair], Mapping[str, Number]]
    """Compute all quantities, by their names. Elements are finite; either matrix may be all zero."""
    is_cheap: bool = False
    """Whether it needs nothing but a pass over the elements: it is measured of every pair that is read."""


@functools.cache
def load_pair_measures() -> tuple[PairMeasure, ...]:
    """Import all measures of pairs, in the order of their names."""
    return tuple(importlib.import_module(f"{pairs.__name__}.{name}").MEASURE for name in pairs.PAIR_MEASURE_NAMES)


@functools.cache
def all_pair_quantities() -> tuple[Quantity, ...]:
    """Return the quantities of all measures of pairs, in the order of the output."""
    return tuple(quantity for measure in load_pair_measures() for quantity in measure.quantities)


def measure_pair(pair: MatrixPair, *, cheap_only: bool = False) -> dict[str, Number] | None:
    """Compute every quantity of two versions of a matrix, by its name.

    Args:
        pair: the matrices.
        cheap_only: leave out, as None, what needs more than a pass over the elements.

    Returns:
        None where an element of either is not finite.
    """
    if not pair.is_finite:
        return None
    values: dict[str, Number] = dict.fromkeys(quantity.name for quantity in all_pair_quantities())
    for measure in load_pair_measures():
        if measure.is_cheap or not cheap_only:
            values |= measure.compute(pair)
    return values
