"""Weight decays, learning rates and a monitor on a live model, from a file or by its spectra. Needs torch only."""

from __future__ import annotations

from esdtool.assignment.document import Assignment
from esdtool.assignment.reading import load_assignment
from esdtool.names import canonical_name
from esdtool.optim.alpha_decay import AlphaDecay
from esdtool.optim.layerwise_lr import LayerwiseLR
from esdtool.optim.monitor_writers import JsonLinesWriter, MonitorWriter, TensorBoardWriter, WandbWriter
from esdtool.optim.spectral_monitor import SpectralMonitor
from esdtool.optim.static import Report, apply, param_groups

__all__ = [
    "AlphaDecay",
    "Assignment",
    "JsonLinesWriter",
    "LayerwiseLR",
    "MonitorWriter",
    "Report",
    "SpectralMonitor",
    "TensorBoardWriter",
    "WandbWriter",
    "apply",
    "canonical_name",
    "load_assignment",
    "param_groups",
]
