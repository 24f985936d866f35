"""The JSON form of a comparison of checkpoints (format `esdtool.checkpoint_comparison`, version 1).

A module and its counterparts share a row. Differences are those from the first checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field

from esdtool.analysis.distances import Distances, quantity_names
from esdtool.analysis.document import Settings, Source, read_document
from esdtool.analysis.record import Record
from esdtool.modules.skipped import SkipKind
from esdtool.support.csv_text import csv_text
from esdtool.support.json_text import model_json
from esdtool.support.words import dimensions

FORMAT: Final = "esdtool.checkpoint_comparison"
VERSION: Final = 1

SIGNIFICANT: Final = 2.0
"""Standard errors between two alphas before they count as different."""

MOVED_MOST: Final = 10
"""Modules in `ComparisonSummary.moved_most`."""


class Compared(Record):
    """One of the checkpoints."""

    checkpoint: str = Field(description="Path or Hub id as the user gave it.")
    label: str = Field(description="A short name that no other checkpoint of the comparison has.")
    source: Source
    settings: Settings
    num_modules: int
    num_scored: int
    num_skipped: int


class Side(Record):
    """A module in one of the checkpoints. Numbers are null where it could not be scored."""

    name: str = Field(description="Its name in this checkpoint.")
    alpha: float | None
    alpha_stderr: float | None
    mp_alpha: float | None = Field(description="Alpha of an untrained matrix of the same shape.")
    verdict: str = Field(description="What the alpha says, or why there is none.")
    num_eigs: int
    difference: float | None = Field(
        default=None, description="alpha - alpha of the first checkpoint; null for the first checkpoint itself."
    )
    significance: float | None = Field(
        default=None, description="difference / sqrt(sum of both squared standard errors)."
    )
    distances: Distances | None = Field(
        default=None,
        exclude_if=lambda distances: distances is None,
        description="How far the weights are from the first checkpoint's. Absent for the first, where they were not "
        "measured, and where a weight is not finite.",
    )


class ComparedModule(Record):
    """A module and its counterparts. What describes it is taken from the first checkpoint."""

    name: str
    role: str
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    sides: tuple[Side | None, ...] = Field(description="One for each checkpoint; null where it has no such module.")

    @property
    def largest_difference(self) -> float | None:
        """The difference of the largest amount; None without any."""
        return largest([side.difference for side in self.sides if side is not None])


class PairSettings(Record):
    """The settings under which the singular vectors of two checkpoints were compared."""

    intruder_vectors: int = Field(description="Largest singular vectors among which intruder dimensions were sought.")
    intruder_similarity: float = Field(
        description="|Cosine| with a vector of the first checkpoint below which a vector is an intruder."
    )


class ComparedRole(Record):
    """Mean alpha of a role, over all of each checkpoint's scored modules."""

    role: str
    counts: tuple[int, ...] = Field(description="Scored modules of the role in each checkpoint.")
    mean_alphas: tuple[float | None, ...] = Field(description="One for each checkpoint; null where it has none.")


class Unmatched(Record):
    """A module of one checkpoint that another has no counterpart of."""

    checkpoint: str = Field(description="Label of the checkpoint that has the module.")
    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def kind(self) -> SkipKind:
        """What tables of left-out tensors group it by."""
        return SkipKind.NO_COUNTERPART


class ComparisonSummary(Record):
    """The comparison in a few numbers. Lists have one value for each checkpoint."""

    mean_alphas: tuple[float | None, ...] = Field(description="Over all scored modules of the checkpoint.")
    mean_differences: tuple[float | None, ...] = Field(
        description="Over the modules that are scored in the first checkpoint and in this; null for the first."
    )
    num_compared: tuple[int, ...] = Field(description="Modules scored in the first checkpoint and in this.")
    num_significant: tuple[int, ...] = Field(
        description=f"Of these, modules whose alpha differs by more than {SIGNIFICANT:g} standard errors."
    )
    by_role: tuple[ComparedRole, ...]
    moved_most: tuple[str, ...] = Field(
        description=f"Names of modules by the largest amount of a difference, at most {MOVED_MOST}, none unchanged."
    )


class CheckpointComparison(Record):
    """Several checkpoints, module by module."""

    format: Literal["esdtool.checkpoint_comparison"] = FORMAT
    version: Literal[1] = VERSION
    created_by: str
    checkpoints: tuple[Compared, ...]
    modules: tuple[ComparedModule, ...] = Field(description="In the order of the first checkpoint.")
    unmatched: tuple[Unmatched, ...] = ()
    pairs: PairSettings | None = Field(
        default=None,
        exclude_if=lambda pairs: pairs is None,
        description="How the singular vectors were compared; absent where they were not.",
    )
    notes: tuple[str, ...] = Field(default=(), description="Why numbers may not be comparable.")
    summary: ComparisonSummary

    @property
    def fit(self) -> str:
        """The estimator of all alphas."""
        return self.checkpoints[0].settings.fit[0]

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of the checkpoints."""
        return tuple(checkpoint.label for checkpoint in self.checkpoints)

    def to_json(self) -> str:
        """Return the comparison as indented JSON with a final newline; the same input gives the same text."""
        return model_json(self)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a comparison that `to_json` wrote.

        Raises:
            CheckpointError: if the file is missing, is no JSON, or is no comparison of version 1.
        """
        return read_document(path, cls, format_name=FORMAT, version=VERSION, what="comparison of checkpoints")

    def to_csv(self) -> str:
        """Return one line a module and checkpoint; `module` is the name in the first checkpoint."""
        sides = [side for module in self.modules for side in module.sides if side is not None]
        measured = any(side.distances is not None for side in sides)
        names = quantity_names(cheap_only=self.pairs is None) if measured else []
        keys = [name for name in Side.model_fields if name != "distances"]
        columns = [f"distances.{name}" for name in names]
        fields = ["module", "role", "layer", "expert", "shape", "checkpoint", *keys, *columns]
        rows: list[dict[str, Any]] = []
        for module in self.modules:
            shared: dict[str, Any] = {"module": module.name, "role": module.role, "layer": module.layer}
            shared |= {"expert": module.expert, "shape": dimensions(module.shape)}
            for checkpoint, side in zip(self.checkpoints, module.sides, strict=True):
                if side is not None:
                    row = shared | {"checkpoint": checkpoint.checkpoint} | side.model_dump(exclude={"distances"})
                    if side.distances is not None:
                        row |= {f"distances.{name}": side.distances.measure(name) for name in names}
                    rows.append(row)
        return csv_text(fields, rows)


def is_significant(side: Side | None) -> bool:
    """Return whether the alpha differs from the first checkpoint's by more than chance."""
    return side is not None and side.significance is not None and abs(side.significance) > SIGNIFICANT


def largest(differences: Sequence[float | None]) -> float | None:
    """Return the value of the largest amount; None without any."""
    return max((value for value in differences if value is not None), key=abs, default=None)
