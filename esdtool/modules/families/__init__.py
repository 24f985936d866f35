"""Rule tables of model families, one file each.

Every module of this package defines `FAMILY`, an `esdtool.modules.rules.Family`, and is found by
itself: to teach esdtool a family's names, add a file. Tables that hold for certain models only
(`model_types`, `marker`) are consulted before the ones that hold for all, each kind in the order
of the file names.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from esdtool.modules.rules import Family


@functools.cache
def load_families() -> tuple[Family, ...]:
    """Return all family tables, in order of precedence."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    families: list[Family] = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    return tuple(sorted(families, key=lambda family: not family.model_types))
