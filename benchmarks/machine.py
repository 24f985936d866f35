"""Describe the machine, the versions and the thread settings to which a recorded number belongs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from esdtool.spectra.lapack import solver_for

PACKAGES = ("esdtool", "torch", "numpy", "scipy", "weightwatcher")


def describe() -> dict[str, Any]:
    """Return the processor, the versions and the environment variables that affect BLAS."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "environment": {
            name: os.environ.get(name)
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE")
        },
    }


def lapack_names() -> dict[str, str]:
    """Name the library that solves matrices of a few orders on this machine, in float64 and float32."""
    return {
        f"{dtype} {order}": solver_for(order, dtype) for dtype in ("float64", "float32") for order in (256, 1024, 4096)
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
