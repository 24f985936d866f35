"""The device to compute on, by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from esdtool.errors import DeviceError, UsageError


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device to compute on.

    Raises:
        UsageError: for an unknown name.
        DeviceError: if the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}; choose auto, cpu, cuda, cuda:N or mps") from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise DeviceError(f"device {device!r} is not available: torch sees {count} CUDA devices; use --device cpu")
    elif chosen.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError("device 'mps' is not available on this machine; use --device cpu")
    elif chosen.type != "cpu":
        raise UsageError(f"unknown device {device!r}; choose auto, cpu, cuda, cuda:N or mps")
    return chosen


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Let this thread's work on a CUDA device run beside that of other threads; elsewhere this changes nothing.

    What the body brings back to the CPU is complete: such copies wait for the stream.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
