"""Measures of two versions of one matrix, one file each.

Every module of this package defines `MEASURE`, an `esdtool.spectra.pair_measure.PairMeasure`, and is found by itself:
its quantities become keys of a module's `distances` in the JSON and its schema, columns of the CSV, rows of the HTML
report's panels and of the table in the documentation.
"""

from __future__ import annotations

import pkgutil

PAIR_MEASURE_NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""The names of all measures of pairs, which are the names of their files, by the alphabet."""
