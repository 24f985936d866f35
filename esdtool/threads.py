"""A pool of threads with one BLAS thread each: how spectra use all cores of the CPU.

Threads rather than processes: the heavy routines release the GIL, a thread starts at once where a
process would import torch for seconds, and tensors are not copied. One BLAS thread each, always, so
that the numbers do not depend on how many workers there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


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


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
