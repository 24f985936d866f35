"""Define how correlation traps stand in files: in an analysis, and in the cache."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict, Field

MOST_ELEMENTS: Final = 10
"""Elements that are listed, those of the largest deviation first."""

MOST_LINES: Final = 5
"""Rows, and columns, that are listed."""


class TrapElement(BaseModel):
    """One element that makes a trap."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    matrix: int = Field(default=0, description="Which matrix of the module, 0 for all but convolutions.")
    row: int
    column: int
    value: float
    eigenvalue: float | None = Field(
        description="Where its eigenvalue is expected after a shuffle; null where float64 has no such number."
    )


class TrapLine(BaseModel):
    """A row or a column that holds elements that make traps."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    index: int
    count: int = Field(description="Elements in it that make traps.")


class Traps(BaseModel):
    """The correlation traps of one module, and the elements that make them."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    from_elements: int = Field(description="Elements that each make a trap.")
    from_mean: int = Field(description="Matrices whose mean makes one.")
    elements: tuple[TrapElement, ...] = Field(
        default=(), description=f"The largest such elements, at most {MOST_ELEMENTS}."
    )
    rows: tuple[TrapLine, ...] = Field(default=(), description=f"Rows with the most of them, at most {MOST_LINES}.")
    columns: tuple[TrapLine, ...] = Field(
        default=(), description=f"Columns with the most of them, at most {MOST_LINES}."
    )

    @property
    def count(self) -> int:
        """The number of traps."""
        return self.from_elements + self.from_mean
