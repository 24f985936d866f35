"""Eigenvalues of Gram matrices that lie on an accelerator, by the way that is fastest there.

Three ways: torch's solver on the device (cuSOLVER on CUDA, batched for small matrices), a reduction to a band on the
device whose second stage the CPU does, and the CPU alone. For each class of orders they are timed once on random
matrices, and the winner is kept (`esdtool.spectra.trial`). Several matrices are in work at a time, so that what counts
is the longer of a way's time on the device and its time on the CPU's cores, not their sum. `ESDTOOL_ACCELERATOR`
(`torch`, `two-stage` or `cpu`) decides without a trial.

torch can be told to prefer MAGMA over cuSOLVER, but that is a setting of the whole process, on which a training beside
us may rely, and torch gives MAGMA up.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from esdtool.errors import UsageError
from esdtool.spectra.band_reduction import reduce_to_band
from esdtool.spectra.lapack import machine_name, symmetric_eigenvalues
from esdtool.spectra.openblas import find_openblas
from esdtool.spectra.options import Solver
from esdtool.spectra.precision import full_precision_matmul
from esdtool.spectra.trial import Question, decide
from esdtool.support.threads import accelerator_workers

Way = Literal["torch", "two-stage", "cpu"]
Matrix = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class _Class:
    """The orders for which one decision holds."""

    largest: float
    sample: int
    """Order of the matrices that decide."""
    batch: int
    """How many of them are solved together."""


_CLASSES = (
    _Class(largest=384, sample=256, batch=16),
    _Class(largest=1024, sample=768, batch=4),
    _Class(largest=3072, sample=2048, batch=1),
    _Class(largest=math.inf, sample=4096, batch=1),
)

_ROUNDS = 2
"""Trials of each way, after one that warms up; the best counts."""

_BANDS = ((2048, 64), (0, 32))
"""Width of the band, by the least order for which it is used."""


def solve_on_accelerator(gram: torch.Tensor) -> tuple[Matrix, Solver]:
    """Compute the eigenvalues of a stack of symmetric matrices.

    Args:
        gram: [batch, n, n] float32 or float64, in both triangles; it may be overwritten.

    Returns:
        [batch * n], ascending within each matrix, and the solver that was chosen. Where the device's solver fails or
        lacks what it needs, the CPU's repeats it.
    """
    way = _way_for(gram)
    if way == "torch":
        return on_device_or_cpu(torch.linalg.eigvalsh, gram).cpu().numpy().reshape(-1), "torch"
    try:
        # The reduction overwrites what a second attempt would need.
        prepared = _prepare(way, gram.clone() if way == "two-stage" else gram)
        return _finish(way, prepared)
    except (RuntimeError, np.linalg.LinAlgError):
        return torch.linalg.eigvalsh(gram.cpu()).numpy().reshape(-1), "torch"


def _prepare(way: Way, gram: torch.Tensor) -> list[Matrix]:
    """Do the device's share of the work of a way other than torch's, and bring the rest to the CPU."""
    if way == "cpu":
        return list(gram.cpu().numpy())
    band = next(band for least, band in _BANDS if gram.shape[-1] >= least)
    # TF32 would ruin the products, and its setting belongs to the process: left alone where it has no effect.
    with full_precision_matmul() if gram.dtype == torch.float32 else nullcontext():
        banded = [reduce_to_band(matrix, band=band) for matrix in gram]
    return [each.cpu().numpy() for each in banded]


def _finish(way: Way, prepared: list[Matrix]) -> tuple[Matrix, Solver]:
    """Do the CPU's share."""
    if way == "cpu":
        found = [symmetric_eigenvalues(matrix) for matrix in prepared]
        return np.concatenate([eigenvalues for eigenvalues, _ in found]), found[-1][1]
    library = find_openblas()
    assert library is not None
    eigenvalues = np.concatenate([library.of_band(banded) for banded in prepared])
    if not np.isfinite(eigenvalues).all():
        raise np.linalg.LinAlgError("the reduction to a band gave no numbers")
    return eigenvalues, "accelerator-two-stage"


def on_device_or_cpu(solver: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    """Run a solver where the data is, and on the CPU if the accelerator's solver fails or lacks it."""
    try:
        result = solver(batch)
    except RuntimeError:  # LinAlgError, a solver library's own failure, no implementation, no memory
        return solver(batch.cpu())
    return result if bool(torch.isfinite(result).all()) else solver(batch.cpu())


def _way_for(gram: torch.Tensor) -> Way:
    """Choose the way for matrices of this order, dtype and device."""
    order, asked = gram.shape[-1], os.environ.get("ESDTOOL_ACCELERATOR")
    possible = _possible(order)
    if asked:
        if asked not in get_args(Way):
            raise UsageError(f"ESDTOOL_ACCELERATOR={asked}: choose from {', '.join(get_args(Way))}")
        return next((way for way in possible if way == asked), "torch")
    if gram.device.type == "cpu" or order == 0:
        return "torch"  # a stand-in for an accelerator, in tests
    kind = next(kind for kind in _CLASSES if order <= kind.largest)
    question = Question(
        folder="accelerator",
        file=f"{machine_name()}-{_device_name(gram.device)}-{str(gram.dtype).removeprefix('torch.')}-{kind.sample}",
        candidates=possible,
        described={"order": kind.sample, "batch": kind.batch, "device": _device_name(gram.device)},
    )
    return decide(question, lambda: _trial(kind, possible, gram.dtype, gram.device))


def _possible(order: int) -> tuple[Way, ...]:
    if find_openblas() is None or order <= _BANDS[-1][1] + 1:
        return ("torch", "cpu")
    return ("torch", "two-stage", "cpu")


def _trial(kind: _Class, ways: tuple[Way, ...], dtype: torch.dtype, device: torch.device) -> dict[Way, float]:
    """Time each way on the Gram matrices of random matrices, in seconds; infinity for one that fails."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(kind.batch, kind.sample, kind.sample, generator=generator, dtype=dtype).to(device)
    gram = sample @ sample.mT
    return {way: min(_rounds(way, gram)) for way in ways}


def _rounds(way: Way, gram: torch.Tensor) -> list[float]:
    seconds = []
    for number in range(_ROUNDS + 1):
        copy = gram.clone()
        _synchronize(gram.device)
        start = time.perf_counter()
        try:
            if way == "torch":
                torch.linalg.eigvalsh(copy).cpu()
                on_device, on_cpu = time.perf_counter() - start, 0.0
            else:
                prepared = _prepare(way, copy)
                on_device, begin = time.perf_counter() - start, time.thread_time()
                _finish(way, prepared)
                on_cpu = time.thread_time() - begin
        except (RuntimeError, np.linalg.LinAlgError):
            return [math.inf]
        if number > 0:
            seconds.append(max(on_device, on_cpu / accelerator_workers()))
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^A-Za-z0-9]+", "-", name)
