"""Predict the time of an analysis from a short calibration on this machine, applied to the shapes of the plan.

Square random matrices of a few orders are scored as the plan's modules will be, as many at a time, so that the threads'
contention for memory and caches is in the figures. Between the orders time is interpolated on logarithmic axes; beyond
the largest it grows with the cube, that of estimates with the square. What a module is longer than square costs its
share of the Gram matrix more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import TYPE_CHECKING

import numpy as np
import torch

from esdtool.spectra.lapack import solver_for
from esdtool.spectra.scoring import score_matrices
from esdtool.spectra.vectors import find_vectors
from esdtool.support.threads import single_blas_workers
from esdtool.support.words import duration

if TYPE_CHECKING:
    from esdtool.analysis.plan import Plan
    from esdtool.modules import WeightModule

_ORDERS = (64, 256, 768, 1792)
"""Orders of the matrices that are timed, up to the plan's largest: about a second in all on a slow core."""

_TIMED_RATIO = 3
"""Ratio of the sides of the matrix that tells what a longer side costs."""

_TIMED_SECONDS = 0.05
"""Seconds for which one order is timed; small ones are repeated."""


_LONG_SECONDS = 60.0
"""Predicted time from which a faster choice is pointed out."""

_SLOW_RATE = 1e10
"""Flops a second that any core of today reaches: what is short at this rate needs no prediction."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured times on this machine, at the plan's settings and number of jobs."""

    orders: tuple[int, ...]
    """Ascending."""
    seconds: tuple[float, ...]
    """Seconds for a square matrix of each order, without reading it."""
    seconds_per_flop: float
    """Rate of the Gram matrix, for the part by which a matrix is longer than square."""
    growth: float = 3.0
    """Exponent of the time beyond the largest order."""

    def of_shape(self, rows: int, columns: int) -> float:
        """Return the predicted seconds of one matrix."""
        short, long = sorted((rows, columns))
        return self._of_square(short) + short**2 * (long - short) * self.seconds_per_flop

    def of_module(self, module: WeightModule) -> float:
        """Return the predicted seconds of a module."""
        rows, columns = module.matrix_shape
        if module.rank is not None:
            rows = columns = min(rows, columns, module.rank)  # see `esdtool.modules.reading.product_core`
        return module.num_matrices * self.of_shape(rows, columns)

    def _of_square(self, order: int) -> float:
        largest = self.orders[-1]
        if order > largest:
            return self.seconds[-1] * math.pow(order / largest, self.growth)
        logs = np.interp(math.log(max(order, self.orders[0])), np.log(self.orders), np.log(self.seconds))
        return float(math.exp(logs))


def calibrate(plan: Plan, *, orders: Sequence[int] = _ORDERS) -> Calibration:
    """Time a few matrices as the plan would score them; about a second.

    Args:
        plan: whose settings, device, number of jobs and largest module count.
        orders: of the matrices; those beyond the plan's largest module are brought down to it.
    """
    largest = max(min(module.matrix_shape) for module in plan.selection.modules)
    orders = sorted({min(order, largest) for order in orders})

    def score(rows: int, columns: int) -> Callable[[], object]:
        matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))

        def work() -> None:
            spectrum = score_matrices([matrix], plan.options, device=plan.device).spectrum
            if plan.options.vectors and spectrum is not None:
                find_vectors([matrix], spectrum, xmin=spectrum.lambda_max, device=plan.device)

        return work

    if plan.device.type == "cpu":
        # The trial of solvers, once for a machine, is no part of what a matrix takes.
        for order in orders:
            solver_for(order, np.float32 if plan.options.fast else np.float64)
    with single_blas_workers(plan.jobs) as pool:
        _time(pool, score(orders[0], orders[0]), plan.jobs)  # the first call loads libraries
        seconds = [_time(pool, score(order, order), plan.jobs) for order in orders]
        middle = orders[min(2, len(orders) - 1)]
        long = _time(pool, score(middle, _TIMED_RATIO * middle), plan.jobs)
    extra = max(long - seconds[orders.index(middle)], 0.0)
    return Calibration(
        orders=tuple(orders),
        seconds=tuple(seconds),
        seconds_per_flop=extra / ((_TIMED_RATIO - 1) * middle**3),
        # An estimate costs a number of products with the matrix.
        growth=2.0 if plan.options.spectrum == "slq" else 3.0,
    )


def estimate_seconds(plan: Plan) -> float:
    """Return the predicted wall-clock seconds of a plan on this machine, reading and the cache aside."""
    calibration = calibrate(plan)
    return makespan([calibration.of_module(module) for module in plan.selection.modules], plan.jobs)


def faster_choice(plan: Plan, seconds: float | None = None) -> str | None:
    """Tell of `--fast` where an analysis takes more than a minute and could have it.

    Args:
        plan: from `make_plan`.
        seconds: its predicted time, if it is known already. Otherwise it is predicted (about a second), unless the
            count of operations alone shows that it is short.

    Returns:
        A remark for the user; None where there is nothing to gain.
    """
    # Single precision halves the time on CPUs; data-centre GPUs are as fast in double precision.
    if plan.options.fast or plan.options.vectors or plan.options.spectrum != "auto" or plan.device.type != "cpu":
        return None
    if seconds is None:
        if plan.cost < _LONG_SECONDS * plan.jobs * _SLOW_RATE:
            return None
        seconds = estimate_seconds(plan)
    if seconds < _LONG_SECONDS:
        return None
    return (
        f"this takes about {duration(seconds)} if no spectrum is in the cache; --fast would take about half of it, "
        "with alphas within 1e-4 (their own standard errors are near 1e-2)"
    )


def makespan(costs: Sequence[float], slots: int) -> float:
    """Return the time when the last of several jobs ends; the longest starts first, each as soon as a slot is free.

    >>> makespan([3.0, 3.0, 2.0, 2.0, 2.0], 2)
    7.0
    """
    free = [0.0] * max(1, min(slots, len(costs)))
    heapify(free)
    for cost in sorted(costs, reverse=True):
        heapreplace(free, free[0] + cost)
    return max(free)


def _time(pool: Executor, work: Callable[[], object], copies: int) -> float:
    """Return the seconds of one call while so many run at a time: the best of a few rounds."""
    best, spent = math.inf, 0.0
    while spent < _TIMED_SECONDS:
        start = time.perf_counter()
        for future in [pool.submit(work) for _ in range(copies)]:
            future.result()
        elapsed = time.perf_counter() - start
        best, spent = min(best, elapsed), spent + elapsed
    return best


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """Data-sheet rates of a GPU."""

    name: str
    flops: float
    """Float64 operations a second in matrix products (tensor cores where they do float64)."""
    bandwidth: float
    """Bytes a second between memory and cores."""


ACCELERATORS = (
    Accelerator(name="A100 80 GB", flops=19.5e12, bandwidth=2.0e12),
    Accelerator(name="H100 SXM", flops=67e12, bandwidth=3.35e12),
    Accelerator(name="RTX 4090", flops=1.29e12, bandwidth=1.0e12),
)


def at_best(modules: Sequence[WeightModule], accelerator: Accelerator) -> float:
    """Return the seconds that one GPU needs at the least: the roofline of its data sheet, not a measurement.

    The Gram matrix, n^2 m, and half of the reduction to tridiagonal form, 2/3 n^3, run at the rate of matrix products;
    the other half is matrix-vector products, which read the remaining matrix, 8/3 n^3 bytes in all.
    """
    seconds = 0.0
    for module in modules:
        short, long = sorted(module.matrix_shape)
        flops = short**2 * long + 2 / 3 * short**3
        seconds += module.num_matrices * (flops / accelerator.flops + 8 / 3 * short**3 / accelerator.bandwidth)
    return seconds
