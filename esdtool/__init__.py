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
    from esdtool.assignment import Assignment, load_assignment
    from esdtool.checkpoint.base import canonical_name
    from esdtool.engine import analyze
    from esdtool.errors import EsdtoolError
    from esdtool.optim import AlphaDecay, apply, param_groups
    from esdtool.spectrum import esd
    from esdtool.tail import TailFit, hill, ks_fit
    from esdtool.weight_decay import assign

_HOME = {
    "AlphaDecay": "optim",
    "Analysis": "analysis",
    "Assignment": "assignment",
    "EsdtoolError": "errors",
    "TailFit": "tail",
    "analyze": "engine",
    "apply": "optim",
    "assign": "weight_decay",
    "canonical_name": "checkpoint.base",
    "esd": "spectrum",
    "hill": "tail",
    "ks_fit": "tail",
    "load_assignment": "assignment",
    "param_groups": "optim",
}

__all__ = [
    "__version__",
    # Spectra and tails.
    "analyze",
    "Analysis",
    "esd",
    "hill",
    "ks_fit",
    "TailFit",
    # Weight decays.
    "assign",
    "Assignment",
    "load_assignment",
    "param_groups",
    "apply",
    "AlphaDecay",
    "canonical_name",
    "EsdtoolError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'esdtool' has no attribute {name!r}")
    return getattr(import_module(f"esdtool.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
