"""Means of the measures that the literature quotes for a whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Final, Protocol

from pydantic import Field

from esdtool.analysis.record import Record

QUOTED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "log_norm": "log norm",
        "alpha": "alpha",
        "alpha_weighted": "weighted alpha",
        "log_alpha_norm": "log alpha norm",
        "log_spectral_norm": "log spectral norm",
        "stable_rank": "stable rank",
        "mp_softrank": "MP soft rank",
    }
)
"""Keys of a module's measures, and their headings, in the order of the summary of WeightWatcher."""


class Mean(Record):
    """The mean of one measure over several modules."""

    plain: float | None = Field(description="Mean in which every module counts once; null if none has a value.")
    by_parameters: float | None = Field(
        description="Mean in which a module counts by the number of its weights; null if none has a value."
    )
    count: int = Field(description="Modules in the mean.")
    left_out: int = Field(description="Modules without a value: not scored, or the measure does not exist for them.")


class Measured(Protocol):
    """A module with a shape; its measures are attributes, None where there is no value."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def means_of(modules: Sequence[Measured]) -> dict[str, Mean]:
    """Average each quoted measure over modules, by its key.

    Args:
        modules: results of an analysis. Those whose measure is None are left out of its mean, and counted.
    """
    return {name: _mean([(getattr(module, name), math.prod(module.shape)) for module in modules]) for name in QUOTED}


def _mean(members: Sequence[tuple[float | None, int]]) -> Mean:
    known = [(value, size) for value, size in members if value is not None]
    left_out = len(members) - len(known)
    if not known:
        return Mean(plain=None, by_parameters=None, count=0, left_out=left_out)
    values, sizes = zip(*known, strict=True)
    return Mean(plain=fmean(values), by_parameters=fmean(values, sizes), count=len(known), left_out=left_out)
