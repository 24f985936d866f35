"""Compute the quantity that decays follow during training, for one module of a live model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Self, cast, get_args

import torch

from esdtool.analysis.module_record import ModuleResult
from esdtool.analysis.module_result import module_result
from esdtool.assignment.options import GradientScoreName, LiveScoreName, ScoreName
from esdtool.assignment.scores import checked_score, score_value
from esdtool.errors import UsageError
from esdtool.modules import WeightModule
from esdtool.spectra.metrics import SpectralMetrics, estimated_metrics, spectral_metrics
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.scoring import ALL_ZERO, score_matrices

SCORES: Final[tuple[str, ...]] = (*get_args(ScoreName), *get_args(GradientScoreName))
"""Everything that decays can follow during training."""

_DESCRIPTION: Final = frozenset({"layer", "expert", "rank", "num_eigs"})
"""Whole numbers of `ModuleResult` that say what a module is, and do not change during training."""

_NUMERIC: Final = (get_args(float | None), get_args(int | None))

NUMBERS: Final[tuple[str, ...]] = tuple(
    name
    for name, described in ModuleResult.model_fields.items()
    if get_args(described.annotation) in _NUMERIC and name not in _DESCRIPTION
)
"""Names of the numbers that a monitor can follow, as the analysis file has them."""

Operands = tuple[torch.Tensor, ...]
"""What is measured of one parameter: the weight, its gradient, or both in this order."""

NO_GRADIENT: Operands = ()
"""The operands of a parameter without a gradient where one is needed."""


@dataclass(frozen=True, kw_only=True)
class LiveScore:
    """One module's numbers at one time."""

    status: str
    """`ok`, or why there is no score, in words."""
    alpha: float | None = None
    """Tail exponent, where the score needs a spectrum."""
    value: float | None = None
    """The score that decays follow; None unless the status is `ok`."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """All numbers of the module's spectrum under the names of `ModuleResult`, where they were asked for."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A function that computes the score of one module from its whole parameter."""

    score: LiveScoreName
    options: ScoreOptions
    device: torch.device | None
    """Where spectra are computed; None: where the tensor is."""
    full: bool = False
    """Whether all numbers of a spectrum are kept, not the score alone."""

    def __post_init__(self) -> None:
        """Refuse unknown scores.

        Raises:
            UsageError: with the valid names.
        """
        if self.score not in SCORES:
            raise UsageError(f"unknown score {self.score!r}; choose from {', '.join(SCORES)}")

    @classmethod
    def of(
        cls,
        score: LiveScoreName,
        fit: str | ScoreOptions,
        device: torch.device | str | None,
        *,
        full: bool = False,
    ) -> Self:
        """Make a measure from the options of a schedule.

        Raises:
            UsageError: if there is no such score or fit.
        """
        return cls(
            score=score,
            options=fit if isinstance(fit, ScoreOptions) else ScoreOptions(fit=(fit,)),
            device=None if device is None else torch.device(device),
            full=full,
        )

    @property
    def reads_gradients(self) -> bool:
        """Whether the score needs gradients, which are not there before the first update."""
        return self.score in get_args(GradientScoreName)

    def operands(self, parameter: torch.nn.Parameter) -> Operands:
        """List what is measured of a parameter as it is now, plain or sharded tensors."""
        if not self.reads_gradients:
            return (parameter.detach(),)
        if parameter.grad is None:
            return NO_GRADIENT
        return (parameter.grad,) if self.score == "gradient_norm" else (parameter.detach(), parameter.grad)

    @property
    def score_alone(self) -> Self:
        """The same measure without the other numbers of the spectra."""
        return replace(self, full=False)

    def matrices(self, module: WeightModule, operands: Operands) -> Sequence[torch.Tensor]:
        """Return the matrices whose eigenvalues are the module's ESD."""
        return module.matrices(operands[0])

    def options_of(self, module: WeightModule) -> ScoreOptions:  # noqa: ARG002 - measures of updates look at it
        """Return the options for one module."""
        return self.options

    def __call__(self, module: WeightModule, operands: Operands) -> LiveScore:
        """Score a module from its whole parameter, each operand of shape `module.stored_shape`."""
        if not operands:
            return LiveScore(status="no gradient")
        if self.reads_gradients:
            return self._of_gradient(module, operands)
        options = self.options_of(module)
        found = score_matrices(
            self.matrices(module, operands), options, device=self.device, scale=module.eigenvalue_scale
        )
        if found.alpha is None:
            return LiveScore(status=found.status)
        if self.score == "alpha":
            value: float | None = found.alpha
        else:
            metrics: SpectralMetrics
            if found.estimate is not None:
                metrics = estimated_metrics(found.estimate)
            else:
                assert found.spectrum is not None
                metrics = spectral_metrics(found.spectrum, module.matrix_shape)
            value = score_value(cast(ScoreName, self.score), found.alpha, metrics)
        value, status = checked_score(self.score, value, is_estimated=found.estimate is not None)
        numbers = numbers_of(module_result(module, found, options)) if self.full else {}
        return LiveScore(status=status, alpha=found.alpha, value=value, numbers=numbers)

    def _of_gradient(self, module: WeightModule, operands: Operands) -> LiveScore:
        """Score a module by its gradient, alone or over its weight."""
        gradient = _norm(module.matrices(operands[-1]))
        if not math.isfinite(gradient):
            return LiveScore(status="the gradient contains NaN or infinity")
        if self.score == "gradient_norm":
            return LiveScore(status="ok", value=gradient)
        matrices = module.matrices(operands[0])
        if self.score == "gradient_over_weight_norm":
            weight = _norm(matrices)
        else:
            weight = max(_largest_eigenvalue(matrix) for matrix in matrices) * module.eigenvalue_scale
        if not math.isfinite(weight):
            return LiveScore(status="not finite: contains NaN or infinity")
        if weight == 0:
            return LiveScore(status=ALL_ZERO)
        value, status = checked_score(self.score, gradient / weight)
        return LiveScore(status=status, value=value)


def numbers_of(result: ModuleResult) -> dict[str, float]:
    """Return the numbers of a module's spectrum that are known, by their names in the analysis file."""
    values = {name: getattr(result, name) for name in NUMBERS}
    return {name: value for name, value in values.items() if value is not None}


def _norm(matrices: Sequence[torch.Tensor]) -> float:
    """Compute the 2-norm of all elements of some matrices together."""
    precision = torch.float32 if matrices[0].device.type == "mps" else torch.float64
    return math.hypot(*(float(torch.linalg.vector_norm(matrix, dtype=precision)) for matrix in matrices))


def _largest_eigenvalue(matrix: torch.Tensor) -> float:
    """Compute the largest eigenvalue of W^T W; NaN or infinity where the matrix contains some."""
    precision = torch.float32 if matrix.device.type == "mps" else torch.float64
    values = matrix.to(precision)
    peak = float(values.abs().max())
    # LAPACK refuses what is not finite.
    return float(torch.linalg.matrix_norm(values, ord=2)) ** 2 if math.isfinite(peak) else peak
