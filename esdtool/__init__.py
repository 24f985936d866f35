"""Spectral analysis of large language model weights, and module-wise weight decay from it.

The names below are the public API. They are imported on first use, so that
`import esdtool` (and `esdtool --help`) does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esdtool._version import __version__
from esdtool.support.lazy import exporter

if TYPE_CHECKING:
    from esdtool.analysis.document import Analysis
    from esdtool.assignment.assign import assign
    from esdtool.assignment.document import Assignment
    from esdtool.assignment.reading import load_assignment
    from esdtool.errors import EsdtoolError
    from esdtool.findings.whole import analyze
    from esdtool.names import canonical_name
    from esdtool.optim import AlphaDecay, LayerwiseLR, SpectralMonitor, apply, param_groups
    from esdtool.spectra.estimators.hill import hill
    from esdtool.spectra.estimators.ks import ks_fit
    from esdtool.spectra.spectrum import esd
    from esdtool.spectra.tail import TailFit

_HOME = {
    "AlphaDecay": "optim",
    "Analysis": "analysis.document",
    "Assignment": "assignment.document",
    "EsdtoolError": "errors",
    "LayerwiseLR": "optim",
    "SpectralMonitor": "optim",
    "TailFit": "spectra.tail",
    "analyze": "findings.whole",
    "apply": "optim",
    "assign": "assignment.assign",
    "canonical_name": "names",
    "esd": "spectra.spectrum",
    "hill": "spectra.estimators.hill",
    "ks_fit": "spectra.estimators.ks",
    "load_assignment": "assignment.reading",
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
    # Weight decays and learning rates.
    "assign",
    "Assignment",
    "load_assignment",
    "param_groups",
    "apply",
    "AlphaDecay",
    "LayerwiseLR",
    # Monitoring.
    "SpectralMonitor",
    "canonical_name",
    "EsdtoolError",
]


__getattr__ = exporter(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
