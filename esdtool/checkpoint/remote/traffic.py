"""Count the bytes that were fetched, for progress and reports."""

from __future__ import annotations

import threading


class Traffic:
    """Bytes that arrived, from all stores together and from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0

    def add(self, count: int) -> None:
        """Note that so many bytes arrived."""
        with self._lock:
            self._bytes += count

    @property
    def bytes(self) -> int:
        """Bytes that arrived so far."""
        return self._bytes


FETCHED = Traffic()
"""All that this process has fetched of weight files and of what lies beside them."""
