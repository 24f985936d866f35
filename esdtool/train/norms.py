"""2-norms of gradients and weights, sharded over ranks or not, and clipping to one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def gradient_norms(parameters: Sequence[nn.Parameter]) -> list[float]:
    """2-norm of each gradient, 0 where there is none; of sharded gradients the whole norm, on every rank."""
    norms = {
        index: torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        for index, parameter in enumerate(parameters)
        if parameter.grad is not None
    }
    found = dict(zip(norms, _whole(torch.stack(list(norms.values()))).tolist(), strict=True)) if norms else {}
    return [float(found.get(index, 0.0)) for index in range(len(parameters))]


def total_norm(tensors: Sequence[torch.Tensor]) -> float:
    """2-norm of all tensors together, in float32; of sharded ones the whole, on every rank."""
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32) for tensor in tensors]
    return float(_whole(torch.linalg.vector_norm(torch.stack(norms))))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def clip_gradients(gradients: Sequence[torch.Tensor], norm: float, limit: float | None) -> float:
    """Scale the gradients down to a total norm of `limit`, as torch does. Returns the norm they have then."""
    if limit is None:
        return norm
    factor = min(1.0, limit / (norm + 1e-6))
    if factor < 1.0:
        torch._foreach_mul_(list(gradients), factor)
    return norm * factor
