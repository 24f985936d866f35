"""A pool of threads with one BLAS thread each: how spectra use all cores of the CPU.

Threads rather than processes: the heavy routines release the GIL, a thread starts at once where a
process would import torch for seconds, and tensors are not copied. One BLAS thread each, always, so
that the numbers do not depend on how many workers there are.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from threadpoolctl import ThreadpoolController, threadpool_limits


@contextmanager
def single_blas_workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `count` threads; numpy's and torch's own thread settings are restored at the end.

    If the body raises (an error, Ctrl-C), work that has not begun is dropped, and work that has is not waited for.
    """
    before = torch.get_num_threads()
    with threadpool_limits(limits=1, user_api="blas"):
        # torch keeps the number of threads per thread: each worker sets its own.
        pool = ThreadPoolExecutor(count, "esdtool", initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        else:
            pool.shutdown()
        finally:
            torch.set_num_threads(before)


class Beside:
    """Calls that are made in threads of their own, while the caller goes on with something else, e.g. training.

    The caller's threads are left alone: torch's number of threads stays what it is for all but ours, and of the BLAS
    libraries only numpy's and scipy's are set to one thread, which torch does not use.

    Args:
        calls: made in this order, `count` at a time. What they return is dropped: they keep their results themselves.
        count: threads.
    """

    def __init__(self, calls: Iterable[Callable[[], object]], count: int) -> None:
        self._todo = deque(calls)
        self._error: BaseException | None = None
        self._limits = _numpy_libraries().limit(limits=1)
        before = torch.get_num_threads()
        ready = threading.Barrier(count + 1)
        self._threads = [
            threading.Thread(target=self._work, args=(ready,), name="esdtool-beside", daemon=True) for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()
        ready.wait()
        # Threads that begin later take the number that was set last: here ours, but for this line.
        torch.set_num_threads(before)
        _at_work.add(self)

    def wait(self) -> None:
        """Until all calls are made.

        Raises:
            BaseException: what the first call that failed raised; the calls after it were not made.
        """
        self._join()
        if self._error is not None:
            raise self._error

    def drop(self) -> None:
        """Make no further calls. Those in progress are waited for: a thread in LAPACK must not outlive Python."""
        self._todo.clear()
        self._join()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()
        self._limits.restore_original_limits()

    def _work(self, ready: threading.Barrier) -> None:
        torch.get_num_threads()  # a thread's first use of torch takes the last number set anywhere, and ours comes then
        torch.set_num_threads(1)
        ready.wait()
        while self._error is None:
            try:
                call = self._todo.popleft()
            except IndexError:
                return
            try:
                call()
            except BaseException as error:  # the caller's business
                self._error = error


_at_work: weakref.WeakSet[Beside] = weakref.WeakSet()


@atexit.register
def _drop_all() -> None:
    for beside in list(_at_work):
        beside.drop()


def _numpy_libraries() -> Any:
    """Return the BLAS libraries that numpy and scipy brought along."""
    controller = ThreadpoolController()
    paths = [info["filepath"] for info in controller.info() if {"numpy", "scipy"} & _owners(info["filepath"])]
    return controller.select(filepath=paths)


def _owners(path: str) -> set[str]:
    """Return the names of packages in a library's path: `numpy.libs` is numpy's."""
    return {part.partition(".")[0] for part in path.replace("\\", "/").split("/")}


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def accelerator_workers() -> int:
    """Threads that keep an accelerator busy: while one waits for a copy or computes on the CPU, others use the device.

    Not measured: no accelerator was at hand.
    """
    return min(available_cores(), 4)
