"""Measures of a module beside alpha, one file each.

Every module of this package defines `MEASURE`, an `esdtool.spectra.measure.Measure`, and is found by itself: its
quantities become keys of a module in the JSON and its schema, columns of the CSV, rows of the HTML report's panels
and of the table in the documentation.
"""

from __future__ import annotations

import pkgutil

MEASURE_NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""The names of all measures, which are the names of their files, by the alphabet."""
