"""Columns that show how far modules are from a base, the same in all tables for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from esdtool.analysis.distances import Distances
from esdtool.spectra.measure import Number
from esdtool.spectra.pair_measure import all_pair_quantities

SHOWN: Final = ("relative_distance", "cka_left", "overlap_left_16", "overlap_right_16", "num_intruders")
"""What the tables show of all that is measured; the JSON and the CSV hold the rest."""


@dataclass(frozen=True, kw_only=True)
class DistanceColumn:
    """A quantity as a column."""

    name: str
    heading: str
    whole: bool

    def value(self, distances: Distances | None) -> Number:
        """Return the number of a row; None where there is none."""
        return None if distances is None else distances.measure(self.name)

    def cell(self, distances: Distances | None) -> str:
        """Return the number as text."""
        value = self.value(distances)
        return "-" if value is None else f"{value:d}" if self.whole else f"{value:{self.spec}}"

    @property
    def spec(self) -> str:
        """Format of the number."""
        return "d" if self.whole else ".3g" if self.name == "relative_distance" else ".4f"


def distance_columns(measured: Iterable[Distances | None]) -> list[DistanceColumn]:
    """Return the columns for what some row has a number of.

    Args:
        measured: the distances of all rows.
    """
    known = [distances for distances in measured if distances is not None]
    quantities = {quantity.name: quantity for quantity in all_pair_quantities()}
    return [
        DistanceColumn(name=name, heading=quantities[name].title, whole=quantities[name].whole)
        for name in SHOWN
        if any(distances.measure(name) is not None for distances in known)
    ]


def distance_terms(measured: Iterable[Distances | None]) -> list[tuple[str, str]]:
    """Return heading and formula of each column that `distance_columns` has."""
    formulas = {quantity.name: quantity.formula for quantity in all_pair_quantities()}
    return [(column.heading, formulas[column.name]) for column in distance_columns(measured)]
