"""Gram matrices and eigenvalues of symmetric matrices on the CPU by the fastest LAPACK at hand.

Three solvers are there: torch's (MKL in the x86 wheels) and two of the OpenBLAS of numpy or scipy, the direct reduction
to tridiagonal form and the one by way of a band, whose width grows with the order. Which one wins depends on the
processor and on the order of the matrix, so that for each class of orders they are timed once on a random matrix, and
the winner is kept (`esdtool.spectra.trial`). `ESDTOOL_LAPACK` (`torch`, `openblas` or one solver by its name) decides
without a trial.

All release the GIL, so that a pool of threads scales.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from esdtool.errors import UsageError
from esdtool.spectra.openblas import find_openblas, symmetric_buffer
from esdtool.spectra.options import Solver
from esdtool.spectra.trial import Question, decide

Matrix = npt.NDArray[Any]
_TWO_STAGE_FROM = 1152
"""Order from which `ESDTOOL_LAPACK=openblas` means the reduction in two stages."""

_BANDS = ((3072, 64), (1792, 48), (0, 32))
"""Width of the band in the two-stage reduction, by the least order for which it is used."""


@dataclass(frozen=True, kw_only=True)
class _Class:
    """The orders for which one decision holds."""

    largest: float
    sample: int
    """Order of the matrix that decides."""
    candidates: tuple[Solver, ...]


_CLASSES = (
    _Class(largest=512, sample=256, candidates=("torch", "openblas-one-stage")),
    _Class(largest=1104, sample=896, candidates=("torch", "openblas-one-stage", "openblas-two-stage")),
    _Class(largest=1536, sample=1280, candidates=("torch", "openblas-one-stage", "openblas-two-stage")),
    _Class(largest=3072, sample=2048, candidates=("torch", "openblas-one-stage", "openblas-two-stage")),
    _Class(largest=math.inf, sample=3136, candidates=("torch", "openblas-two-stage")),
)
"""Two stages never win below the first bound, nor one stage above the last. In between it depends on the processor: on
a Sapphire Rapids MKL's own two stages win from order 1100 in float64 and from 1500 in float32, on a Zen OpenBLAS's one
stage is the fastest up to 2048 in float32."""

_ROUNDS = 3
"""Trials of each solver at most, of which the best counts."""

_TRIAL_SECONDS = 0.1
"""Processor time after which a solver is not tried again."""


def gram_matrix(blocks: Iterable[Matrix]) -> Matrix:
    """Compute the Gram matrix on the rows of a matrix that comes in slices of its columns.

    Args:
        blocks: [n, k] each, float32 or float64, at least one.

    Returns:
        [n, n] of the same dtype, of which only the upper triangle counts: for `symmetric_eigenvalues`.
    """
    library, gram = find_openblas(), None
    for block in blocks:
        if library is None:
            # numpy recognises A @ A.T as a symmetric rank-k product: half the flops.
            gram = block @ block.T if gram is None else np.add(gram, block @ block.T, out=gram)
            continue
        first = gram is None
        if gram is None:
            gram = symmetric_buffer(block.shape[0], block.dtype)
        library.add_gram(block, gram, first=first)
    assert gram is not None
    return gram


def symmetric_eigenvalues(matrix: Matrix) -> tuple[Matrix, Solver]:
    """Compute the eigenvalues of a symmetric matrix, ascending.

    Args:
        matrix: [n, n] float32 or float64, with rows of a unit stride; its upper triangle is read, all is overwritten.

    Returns:
        [n] of the same dtype, and the solver that was chosen.

    Raises:
        np.linalg.LinAlgError: if the solver does not converge.
        UsageError: if `ESDTOOL_LAPACK` names no solver, or one that is not there.
    """
    solver = solver_for(matrix.shape[0], matrix.dtype)
    if matrix.shape[0] == 0:
        return np.empty(0, matrix.dtype), solver
    return _SOLVERS[solver](matrix), solver


def solver_for(order: int, dtype: npt.DTypeLike) -> Solver:
    """Name the solver for matrices of this order and dtype on this machine.

    Raises:
        UsageError: if `ESDTOOL_LAPACK` names no solver, or one that is not there.
    """
    asked = os.environ.get("ESDTOOL_LAPACK")
    if asked:
        return _asked(asked, order)
    kind = next(kind for kind in _CLASSES if order <= kind.largest)
    return _decide(kind, np.dtype(dtype))


def _asked(name: str, order: int) -> Solver:
    if name == "openblas":
        name = "openblas-one-stage" if order < _TWO_STAGE_FROM else "openblas-two-stage"
    for solver in _SOLVERS:
        if solver != name:
            continue
        if solver != "torch" and find_openblas() is None:
            raise UsageError(
                f"ESDTOOL_LAPACK={os.environ['ESDTOOL_LAPACK']}: neither numpy nor scipy brings an OpenBLAS with all "
                "of LAPACK here"
            )
        return solver
    raise UsageError(f"ESDTOOL_LAPACK={name}: choose from torch, openblas, {', '.join(list(_SOLVERS)[1:])}")


def _decide(kind: _Class, dtype: np.dtype[Any]) -> Solver:
    """Recall the decision for a class of matrices, or make it by a trial."""
    if find_openblas() is None:
        return "torch"
    question = Question(
        folder="lapack",
        file=f"{machine_name()}-{dtype.name}-{kind.sample}",
        candidates=kind.candidates,
        described={"order": kind.sample, "dtype": dtype.name},
    )
    return decide(question, lambda: _trial(kind, dtype))


def _trial(kind: _Class, dtype: np.dtype[Any]) -> dict[Solver, float]:
    """Time each candidate on the Gram matrix of a random matrix: the best of a few rounds, in seconds.

    This thread's processor time counts, since other processes may keep the cores busy.
    """
    sample = np.random.default_rng(0).standard_normal((kind.sample, kind.sample)).astype(dtype)
    gram = gram_matrix([sample])
    best: dict[Solver, float] = {}
    for name in kind.candidates:
        _SOLVERS[name](sample[:64, :64] + sample[:64, :64].T)  # the first call loads what it needs
        rounds: list[float] = []
        while len(rounds) < _ROUNDS and sum(rounds) < _TRIAL_SECONDS:
            copy = symmetric_buffer(kind.sample, dtype)
            copy[:] = gram
            start = time.thread_time()
            _SOLVERS[name](copy)
            rounds.append(time.thread_time() - start)
        best[name] = min(rounds)
    return best


def _by_torch(matrix: Matrix) -> Matrix:
    try:
        # torch reads the lower triangle, and its own copy is by columns.
        eigenvalues: Matrix = torch.linalg.eigvalsh(torch.from_numpy(matrix.T)).numpy()
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        raise np.linalg.LinAlgError(str(error)) from error
    return eigenvalues


def _in_one_stage(matrix: Matrix) -> Matrix:
    library = find_openblas()
    assert library is not None
    return library.one_stage(matrix)


def _in_two_stages(matrix: Matrix) -> Matrix:
    library, order = find_openblas(), matrix.shape[0]
    assert library is not None
    band = next(band for least, band in _BANDS if order >= least)
    return library.one_stage(matrix) if order <= band else library.two_stage(matrix, band=band)


_SOLVERS: dict[Solver, Callable[[Matrix], Matrix]] = {
    "torch": _by_torch,
    "openblas-one-stage": _in_one_stage,
    "openblas-two-stage": _in_two_stages,
}


@cache
def machine_name() -> str:
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
