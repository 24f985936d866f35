"""Notice a schedule that is stepped after the optimizer, or never: both train with other values than meant."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

_LOG = logging.getLogger(__name__)

_CALLBACKS = "In Lightning and the Hugging Face Trainer the callback does it"


class CallOrder:
    """Count the first updates of the optimizer until the schedule is stepped for the first time, and warn once."""

    def __init__(self, name: str, optimizers: Sequence[Optimizer]) -> None:
        """Watch the first optimizer, if it lets itself be watched; `name` is what messages call the schedule."""
        self._name = name
        self._updates = 0
        self._is_known = False
        self._handle: Any = None
        own = weakref.ref(self)

        def count(*_: object) -> None:
            order = own()
            if order is not None:
                order._note_update()  # its own method, of an object that the optimizer must not keep

        try:
            self._handle = optimizers[0].register_step_post_hook(count)
        except AttributeError:  # a wrapper that leaves torch's constructor out
            self._is_known = True

    def note_step(self) -> None:
        """Take note that the schedule is stepped."""
        if not self._is_known and self._updates == 1:
            _LOG.warning(
                "%s.step() was called after optimizer.step(): each update is made with the values of the one before; "
                "call it before optimizer.step()",
                self._name,
            )
        self.close()

    def close(self) -> None:
        """Stop watching."""
        self._is_known = True
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _note_update(self) -> None:
        self._updates += 1
        if self._updates == 2 and not self._is_known:
            _LOG.warning(
                "the optimizer has made 2 updates, and %s.step() was not called: the values stay those of the start. "
                "Call it before each optimizer.step(). %s",
                self._name,
                _CALLBACKS,
            )
            self.close()
