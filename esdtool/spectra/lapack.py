"""Eigenvalues of a symmetric matrix on the CPU by the fastest LAPACK at hand.

Two libraries are there: torch's (MKL in the x86 wheels) and the OpenBLAS of numpy or scipy. Which one wins depends on
the processor and on the order of the matrix, so that both are timed once on a random matrix, and the winner is kept in
the user's cache directory. All processes that share this directory use the same one, since the last digits of the
eigenvalues depend on it. `ESDTOOL_LAPACK` (`torch` or `openblas`) decides without a trial.

How OpenBLAS does it follows from the order alone: the direct reduction to tridiagonal form below `TWO_STAGE_FROM`,
from there the one by way of a band, whose width grows with the order.

Both release the GIL, so that a pool of threads scales.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from esdtool.errors import UsageError
from esdtool.spectra.openblas import find_openblas
from esdtool.support.files import cache_directory, publish_once

Matrix = npt.NDArray[Any]
LapackName = Literal["torch", "openblas"]

TWO_STAGE_FROM = 1280
"""Order from which OpenBLAS reduces in two stages."""

_BANDS = ((3072, 64), (1792, 48), (0, 32))
"""Width of the band in the two-stage reduction, by the least order for which it is used."""

_SIZES = ((512, 192), (1280, 768), (math.inf, 1280))
"""Classes of matrices by their largest order, and the order of the matrix that decides for the class."""

_ROUNDS = 3
"""Trials of each library at most, of which the best counts; the first one also loads what it needs."""

_TRIAL_SECONDS = 0.3
"""Processor time after which a library is not tried again."""

_ADVANTAGE = 0.95
"""Share of torch's time that OpenBLAS may take at most to be preferred."""


def symmetric_eigenvalues(matrix: Matrix) -> Matrix:
    """Compute the eigenvalues of a symmetric matrix, ascending.

    Args:
        matrix: [n, n] float32 or float64; overwritten.

    Returns:
        [n] of the same dtype.

    Raises:
        np.linalg.LinAlgError: if the solver does not converge.
        UsageError: if `ESDTOOL_LAPACK` names no library, or one that is not there.
    """
    if matrix.shape[0] == 0:
        return np.empty(0, matrix.dtype)
    return _SOLVERS[lapack_for(matrix.shape[0], matrix.dtype)](np.ascontiguousarray(matrix))


def lapack_for(order: int, dtype: npt.DTypeLike) -> LapackName:
    """Name the library that solves matrices of this order and dtype on this machine.

    Raises:
        UsageError: if `ESDTOOL_LAPACK` names no library, or one that is not there.
    """
    asked = os.environ.get("ESDTOOL_LAPACK")
    if asked:
        return _asked(asked)
    sample = next(sample for largest, sample in _SIZES if order <= largest)
    return _decide(sample, np.dtype(dtype).name, str(cache_directory()))


def _asked(name: str) -> LapackName:
    if name not in get_args(LapackName):
        raise UsageError(f"ESDTOOL_LAPACK={name}: choose from {', '.join(get_args(LapackName))}")
    if name == "openblas" and find_openblas() is None:
        raise UsageError("ESDTOOL_LAPACK=openblas: neither numpy nor scipy brings an OpenBLAS with all of LAPACK here")
    return "openblas" if name == "openblas" else "torch"


_decided: dict[tuple[int, str, str], LapackName] = {}
_deciding = threading.Lock()


def _decide(sample: int, dtype: str, folder: str) -> LapackName:
    """Recall the decision for a class of matrices; the first thread that asks makes it while the others wait."""
    key = (sample, dtype, folder)
    if key not in _decided:
        with _deciding:
            if key not in _decided:
                _decided[key] = _decision(sample, dtype, folder)
    return _decided[key]


def _decision(sample: int, dtype: str, folder: str) -> LapackName:
    """Read the decision for a class of matrices, or make it by a trial and keep it for this machine."""
    if find_openblas() is None:
        return "torch"
    path = Path(folder) / "lapack" / f"{_machine()}-{dtype}-{sample}.json"
    known = _read(path)
    if known is not None:
        return known
    seconds = _trial(sample, np.dtype(dtype))
    chosen: LapackName = "openblas" if seconds["openblas"] < _ADVANTAGE * seconds["torch"] else "torch"
    document = {"lapack": chosen, "seconds": seconds, "order": sample, "dtype": dtype}
    # Without a place to keep it, the decision holds for this process.
    with suppress(OSError):
        publish_once(path, json.dumps(document, indent=1) + "\n")
    # Another process may have been faster: then its decision holds for all.
    return _read(path) or chosen


def _read(path: Path) -> LapackName | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["lapack"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if found in get_args(LapackName) else None


def _trial(order: int, dtype: np.dtype[Any]) -> dict[str, float]:
    """Time each library on the Gram matrix of a random matrix: the best of a few rounds, in seconds.

    This thread's processor time counts, since other processes may keep the cores busy.
    """
    sample = np.random.default_rng(0).standard_normal((order, order)).astype(dtype)
    gram = sample @ sample.T
    best = {}
    for name in get_args(LapackName):
        rounds: list[float] = []
        while len(rounds) < _ROUNDS and sum(rounds) < _TRIAL_SECONDS:
            copy = gram.copy()
            start = time.thread_time()
            _SOLVERS[name](copy)
            rounds.append(time.thread_time() - start)
        best[name] = min(rounds)
    return best


def _by_torch(matrix: Matrix) -> Matrix:
    try:
        eigenvalues: Matrix = torch.linalg.eigvalsh(torch.from_numpy(matrix)).numpy()
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        raise np.linalg.LinAlgError(str(error)) from error
    return eigenvalues


def _by_openblas(matrix: Matrix) -> Matrix:
    library, order = find_openblas(), matrix.shape[0]
    assert library is not None
    if order < TWO_STAGE_FROM:
        return library.one_stage(matrix)
    return library.two_stage(matrix, band=next(band for least, band in _BANDS if order >= least))


_SOLVERS: dict[str, Callable[[Matrix], Matrix]] = {"torch": _by_torch, "openblas": _by_openblas}


@cache
def _machine() -> str:
    """Identify the processor and the versions of both libraries: a decision holds for these alone."""
    described = [_processor(), platform.machine(), torch.__version__, np.__version__, torch.__config__.show()]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


def _processor() -> str:
    """Name the processor, as far as the operating system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
