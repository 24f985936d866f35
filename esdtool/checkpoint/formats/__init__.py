"""Containers of weights, one module each.

Every module of this package defines `CONTAINER`, an `esdtool.checkpoint.container.Container`, and is found by itself:
to teach esdtool a container, add a file. What is in the way of a quick start (torch, numpy, the container's own
library) is imported inside functions, since every command loads the declarations.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from esdtool.checkpoint.container import Container


@functools.cache
def load_containers() -> tuple[Container, ...]:
    """Return all containers, the preferred first."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found: list[Container] = [importlib.import_module(f"{__name__}.{name}").CONTAINER for name in names]
    return tuple(sorted(found, key=lambda container: container.precedence))


def container_of(name: str) -> Container | None:
    """Return the container of a file by its name; None if it is of no known kind.

    >>> container_of("Model.SAFETENSORS").kind
    'a safetensors file'
    """
    return next((container for container in load_containers() if name.lower().endswith(container.suffixes)), None)


@functools.cache
def weight_suffixes() -> tuple[str, ...]:
    """Ends of the names of all weight files, in lower case."""
    return tuple(suffix for container in load_containers() for suffix in container.suffixes)
