"""Rules that find something in an analysis, one file each.

Every module of this package defines `RULE`, an `esdtool.findings.rule.Rule`, and is found by itself: the file's name is
the rule's.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esdtool.findings.rule import Rule


@functools.cache
def load_rules() -> Mapping[str, Rule]:
    """Return every rule by its name, in the order in which findings of one severity stand."""
    rules: dict[str, Rule] = {
        module.name.replace("_", "-"): importlib.import_module(f"{__name__}.{module.name}").RULE
        for module in pkgutil.iter_modules(__path__)
    }
    return MappingProxyType(dict(sorted(rules.items(), key=lambda item: (item[1].order, item[0]))))
