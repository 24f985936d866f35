"""What a weight module is: one parameter that holds one matrix, or one matrix per kernel position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

NORM_OR_BIAS = "1-D (norm or bias)"
"""Why most tensors of a model are skipped."""

CONVOLUTION_SCALE = 0.5
"""Factor of a convolution's eigenvalues (sqrt(0.5) for its weights): the convention of TempBalance and AlphaDecay."""


@dataclass(frozen=True, kw_only=True)
class WeightModule:
    """A module whose weight has an empirical spectral density."""

    name: str
    """Module name: the parameter's without `.weight`, e.g. `model.layers.0.self_attn.q_proj`."""
    parameter: str
    """Tensor name in the checkpoint, e.g. `model.layers.0.self_attn.q_proj.weight`."""
    role: str
    """What the module does in its block, in the field's terms: `q_proj`, `down_proj`, `fc1`, `conv`, ..."""
    layer: int | None
    """Index of the transformer block; None outside a numbered stack."""
    shape: tuple[int, ...]
    """Shape of the parameter as stored."""
    dtype: str
    """Storage dtype, e.g. `bfloat16`."""
    kind: Literal["linear", "conv"] = "linear"
    """`linear`: a 2-D matrix. `conv`: [out, in, *kernel], one matrix [out, in] per kernel position."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of each matrix."""
        return self.shape[0], self.shape[1]

    @property
    def num_matrices(self) -> int:
        """Matrices whose eigenvalues are pooled: 1, or the number of kernel positions."""
        return math.prod(self.shape[2:])

    @property
    def num_eigs(self) -> int:
        """Eigenvalues in the pooled ESD."""
        return min(self.matrix_shape) * self.num_matrices

    @property
    def eigenvalue_scale(self) -> float:
        """Factor of the eigenvalues: 1, or `CONVOLUTION_SCALE`."""
        return CONVOLUTION_SCALE if self.kind == "conv" else 1.0

    def matrices(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The 2-D matrices of this module, as views of `tensor` (shape `self.shape`).

        A convolution gives one matrix [out, in] per kernel position, 1 x 1 kernels included; the eigenvalues of all
        of them together, times `eigenvalue_scale`, are its ESD.
        """
        if self.kind == "linear":
            return [tensor]
        stacked = tensor.reshape(*self.matrix_shape, -1)
        return [stacked[:, :, position] for position in range(stacked.shape[2])]


@dataclass(frozen=True, kw_only=True)
class SkippedTensor:
    """A tensor that is left out, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str
    """In words, e.g. `embedding`, `1-D (norm or bias)`, `fused q, k, v projection: not split yet`."""


def holds_several_matrices(reason: str) -> bool:
    """Whether a tensor was skipped because it holds weight matrices, but several in one.

    >>> holds_several_matrices("fused: q_proj and k_proj in one tensor; ..."), holds_several_matrices(NORM_OR_BIAS)
    (True, False)
    """
    return reason.startswith(("fused: ", "stacked: "))


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Every tensor of a checkpoint, exactly once: scored or skipped."""

    modules: tuple[WeightModule, ...]
    """In the model's natural order."""
    skipped: tuple[SkippedTensor, ...]
    """In the model's natural order."""
