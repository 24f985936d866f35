"""Estimators of alpha, one file each.

Every module of this package defines `ESTIMATOR`, an `esdtool.spectra.estimator.Estimator`, and is found by itself:
`fix_finger.py` is `--fit fix-finger`. Names come from the files, so that the command line knows them without an import.
"""

from __future__ import annotations

import pkgutil

DEFAULT_ESTIMATOR = "hill"
"""The estimator of AlphaDecay."""


def _names() -> tuple[str, ...]:
    names = (module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(names, key=lambda name: (name != DEFAULT_ESTIMATOR, name)))


ESTIMATOR_NAMES = _names()
"""The names of all estimators: the default first, then by the alphabet."""
