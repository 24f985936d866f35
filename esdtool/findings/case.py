"""Define the case that rules look at: the modules of one analysis with all that is known about them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from esdtool.analysis.document import Analysis
from esdtool.analysis.module_record import ModuleResult
from esdtool.analysis.observation import Observation

Vector = npt.NDArray[np.float64]

FALSE_POSITIVES = 0.01
"""Probability that chance alone makes a rule find something in a whole model, whatever the number of its modules."""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A module, and what is known of it beside the analysis file."""

    result: ModuleResult
    eigenvalues: Vector | None
    """[num_eigs] ascending; None where there are none, or float64 has no numbers of their size."""
    observation: Observation | None
    """None if the analysis was read from a file."""

    @property
    def name(self) -> str:
        """The module's name."""
        return self.result.name

    @property
    def is_matrix(self) -> bool:
        """Whether it is one weight matrix, not a low-rank update and not a kernel of several."""
        return self.result.rank is None and len(self.result.shape) == 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """An analysis as one rule sees it."""

    analysis: Analysis
    explained: frozenset[str] = frozenset()
    """Modules that a rule before this one has explained."""

    def __iter__(self) -> Iterator[Suspect]:
        """Yield the modules that are not explained yet, in the model's order."""
        return (suspect for suspect in self.all if suspect.name not in self.explained)

    @cached_property
    def all(self) -> Sequence[Suspect]:
        """All modules."""
        esds: Mapping[str, Vector] = self.analysis.esds
        observations = self.analysis.observations
        return [
            Suspect(result=module, eigenvalues=esds.get(module.name), observation=observations.get(module.name))
            for module in self.analysis.modules
        ]

    @property
    def is_difference(self) -> bool:
        """Whether the modules are the differences from a base."""
        return self.analysis.source.base is not None

    @property
    def critical_z(self) -> float:
        """Standard errors beyond which a deviation of one module is no chance among all modules of the model.

        The level of 1 % a model is divided by the number of modules (Bonferroni), for a two-sided test.
        """
        return NormalDist().inv_cdf(1 - FALSE_POSITIVES / (2 * max(1, len(self.analysis.modules))))

    def command(self, name: str, options: str) -> str:
        """Return the `esdtool analyze` of this checkpoint that looks at one module.

        Args:
            name: the module's.
            options: what follows, as it is typed.
        """
        base = self.analysis.source.base
        words = [*([] if base is None else ["--base", base]), "--include", _exactly(name)]
        return f"{self._analyze} {' '.join(map(shlex.quote, words))} {options}"

    def explanation(self, name: str) -> str:
        """Return the command that says which tensor a module is and why."""
        return f"{self._analyze} --explain {shlex.quote(_exactly(name))}"

    @property
    def _analyze(self) -> str:
        return f"esdtool analyze {shlex.quote(self.analysis.source.checkpoint)}"


def _exactly(name: str) -> str:
    """Return the pattern of one name."""
    return f"^{re.escape(name)}$"
