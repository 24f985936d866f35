"""Compare the task vectors that a merge adds up: what each of its parents changed in a module of the common base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from esdtool.analysis.difference import difference
from esdtool.checkpoint import Checkpoint
from esdtool.modules import WeightModule


@dataclass(frozen=True, kw_only=True)
class TaskVectors:
    """The sizes of what the parents of a merge changed in one module, and of the sum of these changes."""

    norms: tuple[float, ...]
    """Frobenius norm of each parent's difference from the base."""
    sum_norm: float
    """Frobenius norm of the sum of the differences."""
    size: int
    """Number of elements."""

    @property
    def retained(self) -> float | None:
        """Norm of the sum over that of a sum of orthogonal differences: sqrt(parents) if all are equal, 0 if they
        cancel; None where no parent changed anything.
        """
        squares = sum(norm**2 for norm in self.norms)
        return None if squares == 0 else self.sum_norm / math.sqrt(squares)

    @property
    def chance(self) -> float:
        """Standard deviation of `retained` for independent random differences, whose cosines are of size
        1 / sqrt(size): at most this.
        """
        return math.sqrt((len(self.norms) - 1) / len(self.norms) / 2 / self.size)


def task_vectors(
    parents: Sequence[tuple[Checkpoint, WeightModule]], base: Checkpoint, base_module: WeightModule
) -> TaskVectors | None:
    """Compute the sizes of the parents' differences from the base in one module, and of their sum.

    Args:
        parents: the checkpoints and the module in each; they are read one after the other.
        base: the checkpoint that all of them started from.
        base_module: the module in the base.

    Returns:
        None with fewer than two parents.

    Raises:
        CheckpointError: if a tensor cannot be read.
    """
    if len(parents) < 2:
        return None
    total: list[torch.Tensor] = []
    norms = []
    for checkpoint, module in parents:
        changes, _ = difference(checkpoint, module, base, base_module)
        norms.append(_norm(changes))
        if not total:
            total = changes
        else:
            total = [
                one + (other if other.shape == one.shape else other.T)
                for one, other in zip(total, changes, strict=True)
            ]
    return TaskVectors(norms=tuple(norms), sum_norm=_norm(total), size=sum(part.numel() for part in total))


def _norm(matrices: Sequence[torch.Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) for matrix in matrices))
