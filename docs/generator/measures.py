"""Make the table of the measures from their registrations."""

from __future__ import annotations

from esdtool.spectra.measure import all_quantities
from generator.markdown import cell, code, table


def measures() -> str:
    """Return a table of every quantity: key, heading, formula, unit and source."""
    rows = [
        [code(quantity.name), quantity.title, cell(quantity.formula), quantity.unit, cell(quantity.source)]
        for quantity in all_quantities()
    ]
    return table(["key", "in tables", "", "unit", "source"], rows)
