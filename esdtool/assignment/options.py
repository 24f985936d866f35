"""Define the options of an assignment. Imports nothing heavy, so that the command line can show the choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Literal, get_args

from esdtool.errors import EsdtoolError, UsageError

OptimizerName = Literal["adamw", "adam"]
AssignName = Literal["linear", "sqrt", "log2", "sigmoid", "uniform"]
ScoreName = Literal[
    "alpha",
    "stable_rank",
    "frobenius_norm",
    "spectral_norm",
    "alpha_weighted",
    "entropy",
    "eigenvalue_sum",
    "lambda_max",
    "alphahat-softplus",
    "entropy-smoothed",
]
"""What decays can follow that a checkpoint tells; `esdtool.assignment.scores` has the formulas."""
GradientScoreName = Literal["gradient_norm", "gradient_over_weight_norm", "gradient_norm_over_lambda_max"]
"""What decays can follow during training only."""
LiveScoreName = Literal[ScoreName, GradientScoreName]
Granularity = Literal["module", "layer", "role"]
Control = Literal["none", "mean", "shuffled", "reversed"]
Names = Literal["file", "live"]
Unlisted = Literal["keep", "no-decay", "base"]
AssignmentFormat = Literal[
    "json",
    "csv",
    "torch-groups",
    "torchtitan",
    "nemo",
    "axolotl",
    "fairseq2",
    "llama-quantize",
    "peft",
    "spectrum-yaml",
    "spectrum-json",
]
"""Forms of an assignment; `esdtool.assignment.formats` has a file for each."""

LARGEST_SCORE: Final = 1e100
"""Largest magnitude of a score: the formulas square differences of scores."""


def check_choice(what: str, value: object, choices: Any, *, error: type[EsdtoolError] = UsageError) -> None:
    """Refuse a value that is not among those of a `Literal`.

    >>> check_choice("optimizer", "adamw", OptimizerName)

    Args:
        what: the option, for the message.
        value: as given.
        choices: the `Literal`.
        error: class of the error.

    Raises:
        EsdtoolError: of class `error`, with the valid values.
    """
    valid: Sequence[str] = get_args(choices)
    if value not in valid:
        raise error(f"unknown {what} {value!r}; choose from {', '.join(valid)}")


def check_unlisted(value: object, *, error: type[EsdtoolError] = UsageError) -> None:
    """Refuse what is no choice for the parameters that an assignment does not list."""
    check_choice("choice for unlisted parameters", value, Unlisted, error=error)


def check_base(value: float, what: str = "weight-decay", *, error: type[EsdtoolError] = UsageError) -> None:
    """Refuse a base weight decay that is none.

    Args:
        value: the base.
        what: how the user knows it, for the message.
        error: class of the error.

    Raises:
        EsdtoolError: of class `error`, unless it is finite and not negative.
    """
    if not (math.isfinite(value) and value >= 0):
        raise error(f"{what} must be finite and not negative, not {value}")
