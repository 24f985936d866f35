"""Carrying out a plan's work: modules on several threads, reading ahead, within a limit of memory.

One more thread than there are compute slots: while all slots compute, it reads the module that comes next.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from esdtool.checkpoint.base import DTYPE_BYTES
from esdtool.modules import WeightModule
from esdtool.threads import single_blas_workers

Read = TypeVar("Read")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much may be done at a time."""

    jobs: int
    """Modules computed at a time."""
    memory: int | None = None
    """Bytes that the modules in flight may take together; None: no limit. One that needs more is done alone."""
    read_ahead: bool = True
    """Whether a further module may be read meanwhile; not where reading is a collective."""


class MemoryGate:
    """Admits work while its predicted memory fits; work that never fits is admitted alone."""

    def __init__(self, limit: int | None) -> None:
        """An empty gate with room for `limit` bytes, or for anything."""
        self._limit = math.inf if limit is None else limit
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Wait until there is room for `size` bytes, and take it for the body."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


def carry_out(
    modules: Sequence[WeightModule],
    read: Callable[[WeightModule], Read],
    compute: Callable[[WeightModule, Read], Result],
    *,
    limits: Limits,
) -> Iterator[tuple[WeightModule, Result]]:
    """Read and compute every module; yields in the order in which they get done.

    Args:
        modules: begun in this order.
        read: brings a module's weights into memory; called in worker threads.
        compute: called in worker threads, on at most `limits.jobs` modules at a time.
        limits: how much may be done at a time.

    Raises:
        Exception: the first that `read` or `compute` raises; work that has not begun is dropped.
    """
    gate = MemoryGate(limits.memory)
    slots = threading.BoundedSemaphore(limits.jobs)

    def work(module: WeightModule) -> Result:
        with gate.hold(working_bytes(module)):
            weights = read(module)
            with slots:
                return compute(module, weights)

    with single_blas_workers(limits.jobs + limits.read_ahead) as pool:
        futures = {pool.submit(work, module): module for module in modules}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()


def peak_bytes(modules: Sequence[WeightModule], limits: Limits) -> int:
    """Predicted peak memory of the modules in flight."""
    needs = sorted((working_bytes(module) for module in modules), reverse=True)
    ahead = max((_stored_bytes(module) for module in modules), default=0) if limits.read_ahead else 0
    together = sum(needs[: limits.jobs]) + (ahead if len(needs) > limits.jobs else 0)
    return together if limits.memory is None else min(together, max(limits.memory, needs[0]))


def working_bytes(module: WeightModule) -> int:
    """Memory of one module in flight: stored tensor, a float64 slice of it, its Gram matrix and a solver's copy."""
    short, long = sorted(module.matrix_shape)
    return _stored_bytes(module) + 8 * short * min(long, max(short, 2048)) + 3 * 8 * short**2


def _stored_bytes(module: WeightModule) -> int:
    read = (module.rows[1] - module.rows[0]) * math.prod(module.stored_shape[1:])
    return read * DTYPE_BYTES.get(module.dtype, 4)
