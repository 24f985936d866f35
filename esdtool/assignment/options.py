"""What can be asked of an assignment. Imports nothing heavy, so that the command line can show its choices."""

from __future__ import annotations

from typing import Literal

OptimizerName = Literal["adamw", "adam"]


AssignName = Literal["linear", "sqrt", "log2", "sigmoid", "uniform"]


ScoreName = Literal["alpha", "stable_rank", "frobenius_norm", "spectral_norm", "alpha_weighted"]


Granularity = Literal["module", "layer", "role"]


Control = Literal["none", "mean", "shuffled", "reversed"]


Names = Literal["file", "live"]


Unlisted = Literal["keep", "no-decay", "base"]


AssignmentFormat = Literal["json", "csv", "torch-groups"]
