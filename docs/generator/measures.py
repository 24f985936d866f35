"""Make the table of the measures from their registrations."""

from __future__ import annotations

from collections.abc import Iterable

from esdtool.spectra.measure import Quantity, all_quantities
from esdtool.spectra.pair_measure import all_pair_quantities
from generator.markdown import cell, code, table


def measures() -> str:
    """Return a table of every quantity: key, heading, formula, unit and source."""
    return _table(all_quantities())


def pair_measures() -> str:
    """Return the same table of what is measured of two versions of a module."""
    return _table(all_pair_quantities())


def _table(quantities: Iterable[Quantity]) -> str:
    rows = [
        [code(quantity.name), quantity.title, cell(quantity.formula), quantity.unit, cell(quantity.source)]
        for quantity in quantities
    ]
    return table(["key", "in tables", "", "unit", "source"], rows)
