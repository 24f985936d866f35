"""Rows and columns of what `--vectors` found, the same in every report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from esdtool.analysis.document import Analysis
from esdtool.report.tables.analysis import Column, format_number
from esdtool.spectra.vector_records import GROUPS, LocalisedVector, SideName, Vectors

ROLES_TITLE = "singular vectors by role: mean inverse participation ratio over that of random vectors"

_LISTED = 10
"""Vectors that a report lists of the whole model."""

_CHANNELS = {"rows": "row", "columns": "column"}


@dataclass(frozen=True, kw_only=True)
class LocalisedRow:
    """One of the most localised vectors of a model."""

    module: str
    side: SideName
    vector: LocalisedVector

    @property
    def channels(self) -> str:
        """The channels that carry the vector, with their shares."""
        shares = ", ".join(f"{channel.index} ({channel.share:.0%})" for channel in self.vector.channels)
        plural = "s" if len(self.vector.channels) > 1 else ""
        return f"{_CHANNELS[self.side]}{plural} {shares}"

    @property
    def place(self) -> str:
        """The place of the vector's singular value, and of its matrix where the module has several."""
        matrix = f" of matrix {self.vector.matrix}" if self.vector.matrix else ""
        return f"{self.vector.rank}{matrix}"


@dataclass(frozen=True, kw_only=True)
class VectorRoleRow:
    """The vectors of all modules of one role."""

    role: str
    modules: tuple[Vectors, ...]

    def ratio(self, side: SideName, group: str) -> float | None:
        """Return the mean ratio of a group over that of random vectors; None where there is no such vector."""
        sides = [getattr(found, side) for found in self.modules]
        known = [getattr(each, group).ipr / each.ipr_random for each in sides if getattr(each, group) is not None]
        return fmean(known) if known else None

    @property
    def num_localised(self) -> int:
        """The number of localised vectors, of both sides."""
        return sum(side.num_localised for found in self.modules for _, side in found.sides())


def localised_rows(analysis: Analysis) -> list[LocalisedRow]:
    """List the most localised vectors of the model, the most localised first."""
    found = [
        LocalisedRow(module=module.name, side=name, vector=vector)
        for module in analysis.modules
        if module.vectors is not None
        for name, side in module.vectors.sides()
        for vector in side.most_localised
    ]
    return sorted(found, key=lambda row: -row.vector.localisation)[:_LISTED]


def localised_title(analysis: Analysis, rows: Sequence[LocalisedRow]) -> str:
    """Return the title of that list, which says how many there are in all."""
    total = sum(
        side.num_localised
        for module in analysis.modules
        if module.vectors is not None
        for _, side in module.vectors.sides()
    )
    if not rows:
        return "localised singular vectors: none beyond what random matrices have"
    return f"most localised singular vectors, {len(rows)} of {total} beyond what random matrices have"


def role_rows(analysis: Analysis) -> list[VectorRoleRow]:
    """List the roles that have vectors, in the model's order."""
    found: dict[str, list[Vectors]] = {}
    for module in analysis.modules:
        if module.vectors is not None:
            found.setdefault(module.role, []).append(module.vectors)
    return [VectorRoleRow(role=role, modules=tuple(members)) for role, members in found.items()]


def without_vectors(analysis: Analysis) -> str | None:
    """Say which scored modules have no vectors though they were asked for; None if all have them."""
    left = [module for module in analysis.scored if module.vectors is None]
    if not left:
        return None
    return (
        f"No singular vectors of {len(left)} low-rank updates, the first {left[0].name}: an update alone is read as "
        "its singular values. With --base the merged weights have them."
    )


LOCALISED_COLUMNS: tuple[Column[LocalisedRow], ...] = (
    Column(heading="module", cell=lambda row: row.module, is_text=True),
    Column(heading="singular value", cell=lambda row: row.place),
    Column(heading="in the", cell=lambda row: GROUPS[row.vector.in_tail], is_text=True),
    Column(heading="localisation", cell=lambda row: f"{row.vector.localisation:.3f}"),
    Column(heading="carried by", cell=lambda row: row.channels, is_text=True),
)


def _ratio_column(side: SideName, group: str) -> Column[VectorRoleRow]:
    return Column(heading=f"{side}, {group}", cell=lambda row: format_number(row.ratio(side, group), ".2f"))


VECTOR_ROLE_COLUMNS: tuple[Column[VectorRoleRow], ...] = (
    Column(heading="role", cell=lambda row: row.role, is_text=True),
    Column(heading="modules", cell=lambda row: str(len(row.modules))),
    *(_ratio_column(side, group) for side in ("rows", "columns") for group in GROUPS),
    Column(heading="localised", cell=lambda row: str(row.num_localised)),
)
