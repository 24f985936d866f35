"""Spectral analysis of large language model weights, and module-wise weight decay from it.

The names below are the public API. They are imported on first use, so that
`import esdtool` (and `esdtool --help`) does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from esdtool._version import __version__

if TYPE_CHECKING:
    from esdtool.analysis import Analysis
    from esdtool.engine import analyze
    from esdtool.errors import EsdtoolError
    from esdtool.spectrum import esd
    from esdtool.tail import TailFit, hill, ks_fit

_HOME = {
    "Analysis": "analysis",
    "EsdtoolError": "errors",
    "TailFit": "tail",
    "analyze": "engine",
    "esd": "spectrum",
    "hill": "tail",
    "ks_fit": "tail",
}

__all__ = ["Analysis", "EsdtoolError", "TailFit", "__version__", "analyze", "esd", "hill", "ks_fit"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'esdtool' has no attribute {name!r}")
    return getattr(import_module(f"esdtool.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
