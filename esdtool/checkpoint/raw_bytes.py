"""Bytes of a file as the elements of a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


def elements(data: npt.NDArray[np.uint8], dtype: str) -> torch.Tensor:
    """Look at bytes as elements of a type, in the machine's own order, without copying them.

    Args:
        data: the bytes of a whole number of elements.
        dtype: torch's name of the type.

    Returns:
        [n]
    """
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    # torch refuses to look at no bytes at all, whose stride is 0.
    return torch.from_numpy(data).view(kind) if data.size else torch.empty(0, dtype=kind)
