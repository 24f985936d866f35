"""Define an estimator of alpha: the form of every file in `esdtool.spectra.estimators`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esdtool.spectra import estimators
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.tail import TailFit, Vector

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class SubMatrices:
    """A rule that cuts matrices into parts, whose pooled eigenvalues an estimator fits."""

    cut: Callable[[Sequence[torch.Tensor], ScoreOptions], list[torch.Tensor]]
    """Turn matrices [rows, columns] of one shape into parts of one shape. It must also work on tensors without
    storage (device `meta`), from which the untrained null learns the shape and the number of the parts."""
    options: tuple[str, ...]
    """The fields of `ScoreOptions` that the parts depend on."""


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """A way from the eigenvalues of a module to the power law of their tail."""

    fit: Callable[[Vector, ScoreOptions], TailFit]
    """Fit ascending eigenvalues [n] float64, n >= 2, not negative. Where there is no tail it raises ValueError, whose
    message becomes the module's status."""
    options: tuple[str, ...] = ()
    """The fields of `ScoreOptions` that the fit depends on."""
    xmin_index: Callable[[int, ScoreOptions], int] | None = None
    """Ascending index of xmin among n eigenvalues, for an estimator that fixes the size of the tail beforehand: the
    tail may then not begin among the eigenvalues that are rounding. None for one that looks for xmin: the eigenvalues
    that are rounding are handed to it as zeros."""
    sub_matrices: SubMatrices | None = None
    """Fit the pooled eigenvalues of parts of the matrices; None to fit those of the matrices themselves."""
    null_fit: Callable[[Vector, ScoreOptions], TailFit] | None = None
    """A fit of the same alpha for the untrained null, where `fit` does more than fit. None: `fit` itself."""

    @property
    def all_options(self) -> tuple[str, ...]:
        """The fields of `ScoreOptions` that alpha depends on."""
        return self.options if self.sub_matrices is None else (*self.options, *self.sub_matrices.options)


@functools.cache
def load_estimator(name: str) -> Estimator:
    """Import an estimator by its name, one of `esdtool.spectra.estimators.ESTIMATOR_NAMES`."""
    estimator: Estimator = importlib.import_module(f"{estimators.__name__}.{name.replace('-', '_')}").ESTIMATOR
    return estimator
