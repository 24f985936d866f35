from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from esdtool.checkpoint.base import TensorInfo


def _catalogue(tensors: Mapping[str, torch.Tensor | tuple[tuple[int, ...], str] | tuple[int, ...]]) -> list[TensorInfo]:
    infos = []
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        elif value and isinstance(value[-1], str):
            shape, dtype = value
        else:
            shape, dtype = value, "float32"
        infos.append(TensorInfo(name=name, shape=shape, dtype=dtype, file=""))
    return infos


@pytest.fixture(scope="session")
def catalogue() -> Callable[..., list[TensorInfo]]:
    """Tensor infos from a state dict, or from {name: shape} or {name: (shape, dtype)}."""
    return _catalogue
