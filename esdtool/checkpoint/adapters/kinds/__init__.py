"""The kinds of adapters whose updates are computed, one file each.

Every module of this package defines `KIND`, an `esdtool.checkpoint.adapters.base.AdapterKind`, and is found by itself:
to teach esdtool another kind, add a file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esdtool.checkpoint.adapters.base import AdapterKind


@functools.cache
def load_kinds() -> tuple[AdapterKind, ...]:
    """Return all kinds, in order of precedence."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    kinds: list[AdapterKind] = [importlib.import_module(f"{__name__}.{name}").KIND for name in names]
    return tuple(sorted(kinds, key=lambda kind: -kind.precedence))
