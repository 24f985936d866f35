"""Float32 products in full precision on CUDA, whatever the rest of the process has asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _FullPrecision:
    """The process's setting, held at full precision while at least one thread needs it.

    The setting belongs to the process, not to a thread. If each thread restored what it found, the first to leave would
    turn TF32 on under the others, and one that entered later would leave "ieee" behind for good. So the first one in
    remembers and sets, and the last one out restores.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: Any = None

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                name, exact = _setting()
                self._before = getattr(torch.backends.cuda.matmul, name)
                setattr(torch.backends.cuda.matmul, name, exact)
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                setattr(torch.backends.cuda.matmul, _setting()[0], self._before)


def _setting() -> tuple[str, Any]:
    """Return the name of the setting and its value for full precision.

    torch 2.9 gave it a new name, and refuses to read the old one once the new one has been used.
    """
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return "fp32_precision", "ieee"
    return "allow_tf32", False


_FULL_PRECISION = _FullPrecision()


@contextmanager
def full_precision_matmul() -> Iterator[None]:
    """Keep TF32 out of float32 products on CUDA: its 10-bit mantissa would ruin the small eigenvalues.

    Threads may be inside at the same time, and one may enter more than once.
    """
    _FULL_PRECISION.enter()
    try:
        yield
    finally:
        _FULL_PRECISION.leave()
