"""Define the keys of a section that say how the spectra of the current weights are scored."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from esdtool.spectra.estimators import DEFAULT_ESTIMATOR
from esdtool.spectra.options import ScoreOptions, TrainingFitName
from esdtool.train.config.section import Count, Section


class SpectralKeys(Section):
    """Keys of every policy that follows spectra."""

    fit: TrainingFitName = DEFAULT_ESTIMATOR
    """Estimator of alpha."""
    filter_zeros: bool = ScoreOptions.filter_zeros
    """Leave eigenvalues of at most 1e-5 out of the fits, as the public code of AlphaDecay can."""
    fast: bool = ScoreOptions.fast
    """Allow float32 spectra where their error bound admits it."""
    k_fraction: Annotated[float, Field(gt=0, le=1)] = ScoreOptions.k_fraction
    """hill: fraction of the eigenvalues in the tail."""
    min_eigs: Annotated[int, Field(ge=2)] = ScoreOptions.min_eigs
    """Modules with fewer eigenvalues are not scored."""
    farms_rows: Annotated[int, Field(ge=2)] = ScoreOptions.farms_rows
    """farms: rows of a window."""
    farms_ratio: Annotated[float, Field(ge=1)] = ScoreOptions.farms_ratio
    """farms: columns over rows of a window."""
    farms_windows: Count = ScoreOptions.farms_windows
    """farms: windows per dimension."""

    def score_options(self) -> ScoreOptions:
        """The settings that the numbers of a module depend on, as an analysis takes them."""
        return ScoreOptions(
            fit=(self.fit,),
            k_fraction=self.k_fraction,
            min_eigs=self.min_eigs,
            fast=self.fast,
            filter_zeros=self.filter_zeros,
            farms_rows=self.farms_rows,
            farms_ratio=self.farms_ratio,
            farms_windows=self.farms_windows,
        )
