"""Keep a share of the time: what monitoring may take of a training run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from esdtool.errors import UsageError


class TimeShare:
    """Count the seconds that something takes, against all seconds since the start.

    Args:
        limit: the largest share, above 0 and at most 1; None: there is no limit.

    Raises:
        UsageError: if `limit` is no such number.
    """

    def __init__(self, limit: float | None) -> None:
        if limit is not None and (isinstance(limit, bool) or not 0 < limit <= 1):
            raise UsageError(f"max_seconds_share must be above 0 and at most 1, not {limit!r}")
        self.limit = limit
        self.spent = 0.0
        """Seconds counted so far."""
        self._began: float | None = None

    def start(self) -> None:
        """Begin to count, the first time."""
        if self._began is None:
            self._began = time.perf_counter()

    @property
    def share(self) -> float:
        """The share so far, 0 before the start."""
        elapsed = self._elapsed
        return self.spent / elapsed if elapsed > 0 else 0.0

    @property
    def _elapsed(self) -> float:
        return 0.0 if self._began is None else time.perf_counter() - self._began

    def affords(self, seconds: float) -> bool:
        """Tell whether so many more seconds would stay within the limit."""
        return self.limit is None or self.spent + seconds <= self.limit * (self._elapsed + seconds)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the seconds of the block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent += time.perf_counter() - began
