"""Names that a package exports without importing the modules that define them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def exporter(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package whose exported names are imported on first use.

    Args:
        package: the package's `__name__`.
        homes: the module that defines each exported name, relative to the package.

    >>> exporter("esdtool", {"EsdtoolError": "errors"})("EsdtoolError").__name__
    'EsdtoolError'
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get
