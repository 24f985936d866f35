"""SIGTERM and SIGINT as requests that the loop sees between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self


class StopSignals:
    """Remembers a signal while it is open; a second one acts at once, as if nothing had caught it."""

    def __init__(self, on_signal: Callable[[int], None] | None = None) -> None:
        """Catch nothing yet.

        Args:
            on_signal: called in the handler of the first signal, with its number.
        """
        self._on_signal = on_signal
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Start catching. In a thread other than the main one, Python allows no handlers: then nothing is caught."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the handlers."""
        self._restore()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = number
        self._restore()
        if self._on_signal is not None:
            self._on_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
