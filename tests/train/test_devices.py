"""Training on every device: low precision, and a run that is resumed equals the uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esdtool.train.loop import train


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[pytest.mark.gpu, pytest.mark.slow])])
def test_a_resumed_run_in_bf16_equals_the_uninterrupted_one(
    make_config: Callable[..., Any], logs: Callable[[Path], Any], device: torch.device, compiled: bool
) -> None:
    if compiled and device.type == "cpu":
        pytest.skip("torch.compile on the CPU needs a C++ compiler")

    def config(name: str, **sections: Any) -> Any:
        run = {"device": str(device), "compile": compiled}
        return make_config(name, run=run, precision={"name": "bf16-autocast"}, **sections)

    whole = train(config("whole"), quiet=True)
    half = config("half")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, updates=6)
        with pytest.raises(KeyboardInterrupt):
            train(half, quiet=True)
    resumed = train(half, resume="auto", quiet=True)
    assert logs(resumed.run) == logs(whole.run)


def stop_after(patch: pytest.MonkeyPatch, *, updates: int) -> None:
    """Interrupt the loop in the middle of the run, after its first checkpoint."""
    from esdtool.train import loop

    calls, original = 0, loop.summed_loss

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 2 * updates + 1:  # two micro-batches a step
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    patch.setattr(loop, "summed_loss", counted)
