"""`llr`: layer-wise learning rates (He et al. 2026, arXiv 2605.22297)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esdtool.assignment.learning_rate_maps import LLR_RATIOS
from esdtool.train.config.section import Count, NotNegative
from esdtool.train.spectral_rates import SpectralRateSettings


class LlrSettings(SpectralRateSettings):
    """Ratios of 1 to 5 from the spectra of the first fifth of the run (He et al. 2026)."""

    policy: Literal["llr"]
    """`llr`: from the spectra of the first fifth of the run, then frozen (He et al. 2026)."""
    interval: Count = 100
    """Steps between two looks at the spectra."""
    glide: Annotated[int, Field(ge=0)] = 50
    """Steps over which new ratios come into force, in a straight line; 0: at once."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Part of the run after which the ratios stay."""
    min_ratio: NotNegative = LLR_RATIOS[0]
    """linear: ratio of the smallest score."""
    max_ratio: NotNegative = LLR_RATIOS[1]
    """linear: ratio of the largest score."""
    ends: bool = True
    """Give the token embedding and the output head the ratio of the largest score; false: the schedule's rate."""


POLICY = LlrSettings
