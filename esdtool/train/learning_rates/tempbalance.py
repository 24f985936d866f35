"""`tempbalance`: TempBalance (Zhou et al. 2023, arXiv 2312.00359)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esdtool.assignment.learning_rate_maps import TEMPBALANCE_RATIOS
from esdtool.train.config.section import Count, NotNegative
from esdtool.train.spectral_rates import SpectralRateSettings


class TempBalanceSettings(SpectralRateSettings):
    """Ratios of 0.5 to 1.5 from the spectra of the whole run (Zhou et al. 2023)."""

    policy: Literal["tempbalance"]
    """`tempbalance`: from the spectra of the whole run (Zhou et al. 2023)."""
    interval: Count = 200
    """Steps between two looks at the spectra; default: that of the authors' code for language models."""
    glide: Annotated[int, Field(ge=0)] = 0
    """Steps over which new ratios come into force, in a straight line; 0: at once."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of the run after which the ratios stay."""
    min_ratio: NotNegative = TEMPBALANCE_RATIOS[0]
    """linear: ratio of the smallest score."""
    max_ratio: NotNegative = TEMPBALANCE_RATIOS[1]
    """linear: ratio of the largest score."""
    ends: bool = False
    """Give the token embedding and the output head the ratio of the largest score; false: the schedule's rate."""


POLICY = TempBalanceSettings
