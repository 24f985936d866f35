"""Define how statistics of singular vectors stand in files: in an analysis, and in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_VECTORS: Final = 5
"""Vectors of each side that are listed, the most localised first."""

MOST_CHANNELS: Final = 5
"""Channels that are listed of a vector, the largest first."""

SideName = Literal["rows", "columns"]
SIDES: Final[tuple[SideName, ...]] = ("rows", "columns")

GROUPS: Final = ("bulk", "tail")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class VectorGroup(_Frozen):
    """Singular vectors of one side whose eigenvalues lie below xmin (the bulk), or from xmin on (the tail)."""

    count: int
    ipr: float = Field(description="Mean inverse participation ratio, sum v_i^4 of a unit vector v.")
    ipr_max: float = Field(description="Largest inverse participation ratio.")
    localisation: float = Field(description="Mean localisation, see that of a single vector.")
    num_localised: int = Field(description="Vectors whose inverse participation ratio exceeds ipr_ceiling.")


class ChannelShare(_Frozen):
    """A channel of a vector: a row of the matrix for a left singular vector, a column for a right one."""

    index: int
    share: float = Field(description="Its squared element; those of all channels add up to 1.")


class LocalisedVector(_Frozen):
    """A singular vector that few channels carry."""

    matrix: int = Field(default=0, description="Which matrix of the module, 0 for all but convolutions.")
    rank: int = Field(description="Place of its eigenvalue among those of the matrix, 1 for the largest.")
    eigenvalue: float | None = Field(description="Null where float64 has no such number.")
    in_tail: bool = Field(description="Whether the eigenvalue is at least xmin.")
    ipr: float = Field(description="Inverse participation ratio.")
    localisation: float = Field(
        description="(ipr - ipr_random) / (1 - ipr_random), at least 0: 0 as in a random matrix, 1 for one channel."
    )
    channels: tuple[ChannelShare, ...] = Field(
        description=f"The channels with the largest shares, until they hold half of it, at most {MOST_CHANNELS}."
    )


class VectorSide(_Frozen):
    """The singular vectors of one side."""

    dimension: int = Field(description="Number of channels n.")
    ipr_random: float = Field(description="Expected ratio of a random vector, 3 / (n + 2) (Porter and Thomas 1956).")
    ipr_ceiling: float = Field(description="Ratio that no vector of a random matrix reaches, but for one in 1,000.")
    bulk: VectorGroup | None = Field(description="Null where no vector is of the bulk.")
    tail: VectorGroup | None = Field(description="Null where no vector is of the tail.")
    most_localised: tuple[LocalisedVector, ...] = Field(
        default=(), description=f"The most localised vectors above ipr_ceiling, at most {MOST_VECTORS}."
    )

    @property
    def num_localised(self) -> int:
        """The number of localised vectors, of bulk and tail together."""
        return sum(group.num_localised for group in (self.bulk, self.tail) if group is not None)


class Vectors(_Frozen):
    """The singular vectors of one module: how many channels carry them, and which carry the most localised ones."""

    num_vectors: int = Field(description="Pairs of singular vectors that the statistics are of.")
    num_undetermined: int = Field(
        description="Pairs left out: of eigenvalues that are zero, mere rounding, or equal to another one."
    )
    rows: VectorSide = Field(description="Left singular vectors: outputs of nn.Linear, inputs of GPT-2's Conv1D.")
    columns: VectorSide = Field(description="Right singular vectors: inputs of nn.Linear, outputs of GPT-2's Conv1D.")

    def sides(self) -> Iterator[tuple[SideName, VectorSide]]:
        """Yield both sides with their names."""
        yield "rows", self.rows
        yield "columns", self.columns


def flat_vectors(found: Vectors | None) -> dict[str, float | int | None]:
    """Return the columns of a table for the vectors of one module; all None where there are none."""
    row: dict[str, float | int | None] = {}
    for name in SIDES:
        side: VectorSide | None = None if found is None else getattr(found, name)
        row[f"vectors.{name}.ipr_random"] = None if side is None else side.ipr_random
        for label in GROUPS:
            group: VectorGroup | None = None if side is None else getattr(side, label)
            for key in VectorGroup.model_fields:
                row[f"vectors.{name}.{label}.{key}"] = None if group is None else getattr(group, key)
        first = side.most_localised[0].channels[0] if side is not None and side.most_localised else None
        row[f"vectors.{name}.channel"] = None if first is None else first.index
        row[f"vectors.{name}.channel_share"] = None if first is None else first.share
    return row
