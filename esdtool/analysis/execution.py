"""Carrying out a plan's work: modules on several threads, reading ahead, within a limit of memory.

One more thread than there are compute slots: while all slots compute, it reads the module that comes next. Of a remote
checkpoint two come next.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from esdtool.checkpoint.base import DTYPE_BYTES
from esdtool.errors import LackOfMemoryError
from esdtool.modules import WeightModule
from esdtool.support.memory import is_lack_of_memory
from esdtool.support.sizes import format_size
from esdtool.support.threads import single_blas_workers
from esdtool.support.words import dimensions, listed

Batch = tuple[WeightModule, ...]
Read = TypeVar("Read")
Result = TypeVar("Result")


_BATCH_ORDER = 1024
"""Largest short side of matrices that are computed together."""

_BATCH_BYTES = 256 * 2**20
"""Most memory of a batch."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits on the work done at a time."""

    jobs: int
    """Modules computed at a time."""
    memory: int | None = None
    """Bytes that the modules in flight may take together; None: no limit. One that needs more is done alone."""
    read_ahead: bool = True
    """Whether a further module may be read meanwhile; not where reading is a collective."""
    is_remote: bool = False
    """Whether modules are fetched over a network, which two may wait for."""
    beside: Mapping[str, int] = field(default_factory=dict)
    """Bytes that a module takes besides its own, by name: its base's weight, and the difference or sum of both."""

    vectors: bool = False
    """Whether singular vectors are computed as well."""

    @property
    def ahead(self) -> int:
        """Modules that are read while others are computed."""
        return 0 if not self.read_ahead else 2 if self.is_remote else 1

    def need(self, batch: Batch) -> int:
        """Return the predicted memory of a batch in flight."""
        each = (working_bytes(module, vectors=self.vectors) + self.beside.get(module.name, 0) for module in batch)
        return sum(each)


class MemoryGate:
    """Admits work while its predicted memory fits; work that never fits is admitted alone."""

    def __init__(self, limit: int | None) -> None:
        """Open an empty gate with room for `limit` bytes, or for anything."""
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
    batches: Sequence[Batch],
    read: Callable[[Batch], Read],
    compute: Callable[[Batch, Read], Result],
    *,
    limits: Limits,
) -> Iterator[tuple[Batch, Result]]:
    """Read and compute every batch of modules; yields in the order in which they get done.

    Args:
        batches: of `batches_of`; begun in this order.
        read: brings a batch's weights into memory; called in worker threads.
        compute: called in worker threads, on at most `limits.jobs` batches at a time.
        limits: how much may be done at a time.

    Raises:
        Exception: the first that `read` or `compute` raises; work that has not begun is dropped.
    """
    gate = MemoryGate(limits.memory)
    slots = threading.BoundedSemaphore(limits.jobs)

    def work(batch: Batch) -> Result:
        with gate.hold(limits.need(batch)):
            weights = read(batch)
            with slots:
                return compute(batch, weights)

    with single_blas_workers(limits.jobs + limits.ahead) as pool:
        futures = {pool.submit(work, batch): batch for batch in batches}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()


@contextmanager
def lack_of_memory_named(batch: Batch, limits: Limits, *, location: str) -> Iterator[None]:
    """Turn a lack of memory in the body into an error that names the modules and what to do.

    Args:
        batch: the modules that are read or computed.
        limits: how much is done at a time.
        location: the checkpoint's.

    Raises:
        LackOfMemoryError: in the place of whatever exception means that memory did not suffice.
    """
    try:
        yield
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
        shapes = listed(dict.fromkeys(dimensions(module.shape) for module in batch))
        raise LackOfMemoryError(
            f"{location}: {listed(module.name for module in batch)}: not enough memory: {shapes} takes about "
            f"{format_size(limits.need(batch))}; lower --jobs (modules at a time) or --memory (bytes that they may "
            "take together), or use a larger machine"
        ) from error


def batches_of(modules: Sequence[WeightModule], *, together: bool, limits: Limits) -> list[Batch]:
    """Return the jobs, in the order of `modules`.

    On a CPU (`together` false) each module by itself: threads share the work, and a core is busy with any matrix. On an
    accelerator, which a small matrix leaves idle, neighbours of one shape up to order 1024 are put together, as far as
    256 MiB and `limits.memory` allow. (Not measured: no accelerator was at hand.)
    """
    if not together:
        return [(module,) for module in modules]
    most = min(_BATCH_BYTES, limits.memory or _BATCH_BYTES)
    batches: list[list[WeightModule]] = []
    size = 0
    for module in modules:
        need = limits.need((module,))
        if batches and size + need <= most and _go_together(batches[-1][0], module):
            batches[-1].append(module)
            size += need
        else:
            batches.append([module])
            size = need
    return list(map(tuple, batches))


def in_turn(batches: Sequence[Batch], *, jobs: int) -> list[Batch]:
    """Return jobs that are fetched over a network, so ordered that fetching and computing keep each other busy.

    A large module has more bytes for its work than a small one (n m for n^2 m + 4/3 n^3). One after the other from the
    most expensive on, the cores would wait for the link first, and later the link for the cores. So the first is the
    cheapest, which comes soonest, the second the most expensive, and so on from both ends. Where there are few for each
    core the order stays: then it counts most that no expensive one is begun late.

    Args:
        batches: from the most expensive to the cheapest.
        jobs: modules computed at a time.
    """
    if len(batches) <= 4 * jobs:
        return list(batches)
    half = len(batches) // 2
    pairs = zip(reversed(batches[half:]), [*batches[:half], None], strict=False)
    return [batch for pair in pairs for batch in pair if batch is not None]


def _go_together(one: WeightModule, other: WeightModule) -> bool:
    is_small = min(one.matrix_shape) <= _BATCH_ORDER and one.num_matrices == other.num_matrices == 1
    return is_small and (one.matrix_shape, one.dtype, one.rank) == (other.matrix_shape, other.dtype, other.rank)


def peak_bytes(batches: Sequence[Batch], limits: Limits) -> int:
    """Return the predicted peak memory of the batches in flight."""
    needs = sorted(map(limits.need, batches), reverse=True)
    ahead = sum(sorted((_bytes_ahead(batch, limits) for batch in batches), reverse=True)[: limits.ahead])
    together = sum(needs[: limits.jobs]) + (ahead if len(needs) > limits.jobs else 0)
    return together if limits.memory is None else min(together, max(limits.memory, needs[0]))


def working_bytes(module: WeightModule, *, vectors: bool = False) -> int:
    """Memory of one module in flight: stored tensor, a float64 slice of it, its Gram matrix and a solver's copy.

    A solver that gives `vectors` as well takes three more such copies.
    """
    short, long = sorted(module.matrix_shape)
    copies = 6 if vectors else 3
    return read_bytes(module) + 8 * short * min(long, max(short, 2048)) + copies * 8 * short**2


def _bytes_ahead(batch: Batch, limits: Limits) -> int:
    return sum(read_bytes(module) + limits.beside.get(module.name, 0) for module in batch)


def read_bytes(module: WeightModule) -> int:
    """Memory of the part of a stored tensor that a module is read from."""
    read = (module.rows[1] - module.rows[0]) * math.prod(module.stored_shape[1:])
    return read * DTYPE_BYTES.get(module.dtype, 4)
