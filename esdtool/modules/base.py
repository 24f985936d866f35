"""Define weight modules: a parameter, or a part of one, that holds one matrix, or one matrix per kernel position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from esdtool.modules.identification import IdentifiedBy
from esdtool.modules.skipped import SkippedTensor

if TYPE_CHECKING:
    import torch

    from esdtool.checkpoint.base import TrainedParameter

CONVOLUTION_SCALE = 0.5
"""Factor of a convolution's eigenvalues (sqrt(0.5) for its weights): the convention of TempBalance and AlphaDecay."""


@dataclass(frozen=True, kw_only=True)
class View:
    """The place of one module's weight in a tensor that holds several.

    The first dimension may stack the matrices of all experts, of which one is taken. Along `axis` of what is left,
    positions come in `groups` equal groups (one per head, say), and positions `start` to `stop` of every group are
    the module's. So contiguous parts have one group, and interleaved ones many.
    """

    expert: int | None = None
    """Index of the expert's matrix; None where nothing is stacked."""
    num_experts: int = 1
    """Matrices in the stack: [experts, rows, columns], or [experts * rows, columns]."""
    axis: int = 0
    groups: int = 1
    start: int = 0
    stop: int | None = None
    """End of the module's positions in a group; None: everything along `axis`."""

    def rows(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The smallest range of the tensor's first dimension that holds the module."""
        if self.expert is not None:
            each = shape[0] // self.num_experts
            return self.expert * each, (self.expert + 1) * each
        if self.axis == 0 and self.groups == 1 and self.stop is not None:
            return self.start, self.stop
        return 0, shape[0]

    def part(self, rows: torch.Tensor) -> torch.Tensor:
        """The module's weight as a view (a copy where groups are many) of the tensor's `rows`."""
        if self.expert is not None and rows.ndim > 2:
            rows = rows[0]
        if self.stop is None or (self.expert is None and self.axis == 0 and self.groups == 1):
            return rows  # `rows` holds nothing else
        grouped: torch.Tensor = rows.unflatten(self.axis, (self.groups, -1))
        return grouped.narrow(self.axis + 1, self.start, self.stop - self.start).flatten(self.axis, self.axis + 1)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the module's weight in a tensor of shape `whole`."""
        sizes = list(whole)
        if self.expert is not None:
            sizes = sizes[1:] if len(sizes) > 2 else [sizes[0] // self.num_experts, *sizes[1:]]
        if self.stop is not None:
            sizes[self.axis] = self.groups * (self.stop - self.start)
        return tuple(sizes)


@dataclass(frozen=True, kw_only=True)
class WeightModule:
    """A module whose weight has an empirical spectral density."""

    name: str
    """Module name: the parameter's without `.weight`, e.g. `model.layers.0.self_attn.q_proj`. A part of a fused
    tensor has the name that it would have alone; an expert's number is a segment of the name."""
    parameter: str
    """Tensor name in the checkpoint, e.g. `model.layers.0.self_attn.q_proj.weight`. Parts of one tensor share it."""
    role: str
    """What the module does in its block, in the field's terms: `q_proj`, `down_proj`, `fc1`, `conv`, ..."""
    layer: int | None
    """Index of the transformer block; None outside a numbered stack."""
    shape: tuple[int, ...]
    """Shape of the module's weight."""
    dtype: str
    """Storage dtype, e.g. `bfloat16`, or the format of quantised weights, e.g. `nf4`."""
    kind: Literal["linear", "conv", "headwise"] = "linear"
    """`linear`: a 2-D matrix. `conv`: [out, in, *kernel], one matrix [out, in] per kernel position. `headwise`:
    [heads, rows, columns], one matrix per head."""
    expert: int | None = None
    """Index of the expert in a mixture; None for all other modules."""
    view: View | None = None
    """Where the module lies in its parameter; None: it is the whole parameter."""
    parameter_shape: tuple[int, ...] | None = None
    """Shape of the parameter, where `view` is given."""
    rank: int | None = None
    """Largest possible rank of a low-rank product (LoRA); the eigenvalues beyond it are no part of the ESD."""
    roundoff: float | None = None
    """Relative rounding error of the stored weights, where it is more than that of a floating-point dtype."""
    trained: tuple[TrainedParameter, ...] | None = None
    """The parameters that a trainer has in the place of `parameter`; see `TensorInfo.trained`."""
    identified_by: IdentifiedBy = IdentifiedBy.FAMILY
    """How sure it is that this is a matrix of the model."""
    note: str | None = None
    """A remark on what the tensor may hold beside; `PERHAPS_SEVERAL` or None."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self.shape if self.parameter_shape is None else self.parameter_shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of each matrix."""
        return (self.shape[1], self.shape[2]) if self.kind == "headwise" else (self.shape[0], self.shape[1])

    @property
    def num_matrices(self) -> int:
        """Number of matrices whose eigenvalues are pooled: 1, or one for each kernel position or head."""
        return self.shape[0] if self.kind == "headwise" else math.prod(self.shape[2:])

    @property
    def num_eigs(self) -> int:
        """Eigenvalues in the pooled ESD."""
        each = min(self.matrix_shape)
        return (each if self.rank is None else min(each, self.rank)) * self.num_matrices

    @property
    def eigenvalue_scale(self) -> float:
        """Factor of the eigenvalues: 1, or `CONVOLUTION_SCALE`."""
        return CONVOLUTION_SCALE if self.kind == "conv" else 1.0

    @property
    def rows(self) -> tuple[int, int]:
        """Positions of the parameter's first dimension that are needed to read the module."""
        return (0, self.shape[0]) if self.view is None else self.view.rows(self.stored_shape)

    def matrices(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The 2-D matrices of this module, from the whole parameter (shape `stored_shape`).

        A convolution gives one matrix [out, in] per kernel position, 1 x 1 kernels included; the eigenvalues of all
        of them together, times `eigenvalue_scale`, are its ESD.
        """
        return self.matrices_of_rows(tensor[slice(*self.rows)])

    def matrices_of_rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The same from the positions `rows` of the parameter's first dimension."""
        weight = rows if self.view is None else self.view.part(rows)
        if self.kind == "linear":
            return [weight]
        if self.kind == "headwise":
            return list(weight)
        stacked = weight.reshape(*self.matrix_shape, -1)
        return [stacked[:, :, position] for position in range(stacked.shape[2])]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Every tensor of a checkpoint: scored, as one module or as several, or else skipped."""

    modules: tuple[WeightModule, ...]
    """In the model's natural order."""
    skipped: tuple[SkippedTensor, ...]
    """In the model's natural order."""
    rules: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """What decided on each tensor, in words, by the tensor's name."""


def cost(module: WeightModule) -> float:
    """Predicted work of a module's spectrum in flops: n^2 m for the Gram matrix and 4/3 n^3 for its reduction."""
    short, long = sorted(module.matrix_shape) if module.rank is None else (module.rank, max(module.matrix_shape))
    return module.num_matrices * (short**2 * long + 4 / 3 * short**3)
