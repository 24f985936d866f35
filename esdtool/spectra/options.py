"""Define the options of an analysis. Imports nothing heavy, so that the command line can show the choices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from esdtool.errors import UsageError
from esdtool.spectra.estimators import DEFAULT_ESTIMATOR, ESTIMATOR_NAMES

SpectrumPath = Literal["gram-float32", "gram-float64", "svd-float64"]
Solver = Literal["torch", "openblas-one-stage", "openblas-two-stage", "accelerator-two-stage"]
"""Who computes the eigenvalues: torch (on the CPU the LAPACK in its wheel, on a GPU cuSOLVER or MAGMA), the OpenBLAS of
numpy or scipy (see `esdtool.spectra.lapack`), or an accelerator and that OpenBLAS together (see
`esdtool.spectra.accelerator_solvers`)."""
SpectrumName = Literal["auto", "gram", "svd", "slq"]
SPECTRA: tuple[str, ...] = get_args(SpectrumName)
FixFingerBound = Literal["linear", "legacy"]
TrapsName = Literal["law", "shuffle"]
TRAPS: tuple[str, ...] = get_args(TrapsName)

FITS = ESTIMATOR_NAMES
"""Names of the estimators of alpha, the default first."""

# `powerlaw` and `tpl` take seconds a module; the alpha of the first is that of `ks`.
TRAINING_FITS = tuple(name for name in FITS if name not in ("powerlaw", "tpl"))
"""Names of the estimators that a training run can measure its weights with."""

if TYPE_CHECKING:
    TrainingFitName = str
else:
    # Pydantic refuses other names, and lists these in the schema.
    TrainingFitName = Literal[TRAINING_FITS]

LOW_RANK_MIN_EIGS = 8
"""Fewest eigenvalues of a module of known low rank, such as a LoRA update: it has no more than its rank."""


ESTIMABLE_FRACTIONS = (0.1, 0.9)
"""Least and largest fraction of the eigenvalues in a tail that can be estimated."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Everything that a module's numbers depend on, besides its weights."""

    fit: tuple[str, ...] = (DEFAULT_ESTIMATOR,)
    """Estimators of alpha, from `FITS`; the first gives the alpha that the others of the tool use."""
    k_fraction: float = 0.5
    """Fraction of the eigenvalues in the Hill estimator's tail, in (0, 1]."""
    min_eigs: int = 50
    """Modules with fewer eigenvalues are not scored."""
    spectrum: SpectrumName = "auto"
    """`auto`: climb the ladder as needed; `gram`, `svd`: stay on that path; `slq`: estimate what is large (see
    `esdtool.spectra.slq`), the rest as `auto`."""
    fast: bool = False
    """Allow float32 where its error bound admits it."""
    filter_zeros: bool = False
    """Leave eigenvalues of at most 1e-5 out of the fits, as the public code of AlphaDecay can. Alpha then depends on
    the scale of the weights."""
    fix_finger_bound: FixFingerBound = "linear"
    """Lower bound of `fix-finger`; `esdtool.spectra.estimators.fix_finger` explains both."""
    farms_rows: int = 100
    """Rows of a FARMS window."""
    farms_ratio: float = 2.0
    """Columns over rows of a FARMS window."""
    farms_windows: int = 10
    """FARMS windows per dimension."""

    traps: TrapsName = "law"
    """`law`: count correlation traps by the law alone; `shuffle`: also draw them (`esdtool.spectra.traps`)."""
    seed: int = 0
    """Seed of the draws."""
    vectors: bool = False
    """Also compute the singular vectors, and how localised they are (`esdtool.spectra.vectors`)."""

    def __post_init__(self) -> None:
        """Refuse what no module could be scored with.

        Raises:
            UsageError: with the option's name and its valid values.
        """
        if not self.fit:
            raise UsageError("at least one fit is needed; choose from " + ", ".join(FITS))
        for name in self.fit:
            if name not in FITS:
                raise UsageError(f"unknown fit {name!r}; choose from {', '.join(FITS)}")
        if len(set(self.fit)) < len(self.fit):
            raise UsageError(f"a fit is named twice: {', '.join(self.fit)}")
        if self.spectrum not in SPECTRA:
            raise UsageError(f"unknown spectrum {self.spectrum!r}; choose from {', '.join(SPECTRA)}")
        if self.fix_finger_bound not in ("linear", "legacy"):
            raise UsageError(f"unknown fix-finger bound {self.fix_finger_bound!r}; choose from linear, legacy")
        if self.traps not in TRAPS:
            raise UsageError(f"unknown traps {self.traps!r}; choose from {', '.join(TRAPS)}")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"seed must be in [0, 2^31), not {self.seed}")
        if not 0 < self.k_fraction <= 1:
            raise UsageError(f"k-fraction must be in (0, 1], not {self.k_fraction}")
        if self.min_eigs < 2:
            raise UsageError(f"min-eigs must be at least 2, not {self.min_eigs}")
        if self.farms_rows < 2 or self.farms_windows < 1 or not 1 <= self.farms_ratio < math.inf:
            raise UsageError("FARMS needs rows >= 2, windows >= 1 and ratio >= 1")
        if self.fast and self.spectrum == "svd":
            raise UsageError("--fast is the float32 Gram path and contradicts --spectrum svd")
        if self.spectrum == "slq":
            self.check_exact("--spectrum slq")
            self.check_estimable("--spectrum slq")

    def check_exact(self, asked: str) -> None:
        """Refuse options that need the decomposition which an estimate saves.

        Args:
            asked: what asked for estimates, for the message.

        Raises:
            UsageError: if singular vectors are wanted.
        """
        if self.vectors:
            raise UsageError(f"--vectors needs a full decomposition of each module, which {asked} saves: leave out one")

    def check_estimable(self, asked: str) -> None:
        """Refuse options under which no alpha can be estimated without its eigenvalues.

        Args:
            asked: what asked for estimates, for the message.

        Raises:
            UsageError: if alpha is not by `hill`, or its tail is too short or too long.
        """
        if self.fit[0] != "hill":
            raise UsageError(
                f"{asked} estimates alpha by 'hill' only, not by {self.fit[0]!r}: the other fits need every eigenvalue"
            )
        if self.filter_zeros:
            raise UsageError(f"{asked} cannot leave out small eigenvalues (--filter-zeros), which it does not compute")
        low, high = ESTIMABLE_FRACTIONS
        if not low <= self.k_fraction <= high:
            raise UsageError(f"{asked} needs a k-fraction in [{low}, {high}], not {self.k_fraction}")

    @property
    def ladder(self) -> tuple[SpectrumPath, ...]:
        """The spectrum paths to try, the cheapest first."""
        if self.spectrum == "svd":
            return ("svd-float64",)
        gram: tuple[SpectrumPath, ...] = ("gram-float32", "gram-float64") if self.fast else ("gram-float64",)
        return gram if self.spectrum == "gram" else (*gram, "svd-float64")


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Choose what is measured of two versions of a module, a base and another."""

    distances: bool = False
    """Everything, with singular vectors; otherwise only what a pass over the elements gives."""
    intruder_vectors: int = 10
    """Largest singular vectors among which intruder dimensions are sought."""
    intruder_similarity: float = 0.5
    """A vector that resembles none of the base as much as this, as |cosine|, is an intruder."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            UsageError: with the option's name and its valid values.
        """
        if self.intruder_vectors < 1:
            raise UsageError(f"intruder-vectors must be at least 1, not {self.intruder_vectors}")
        if not 0 < self.intruder_similarity <= 1:
            raise UsageError(f"intruder-similarity must be in (0, 1], not {self.intruder_similarity}")
