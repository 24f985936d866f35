"""The result of an analysis and its JSON form (format `esdtool.analysis`, version 1).

The models here are the file boundary: what `esdtool analyze --json` writes, what
`esdtool assign` reads, and what `esdtool schema analysis` publishes. Numbers are plain
finite floats or null; nothing depends on the time or the machine, so the same input
gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

from pydantic import (
    Field,
    PrivateAttr,
    ValidationError,
)

from esdtool.analysis.distances import quantity_names
from esdtool.analysis.finding import Finding
from esdtool.analysis.head_result import HeadResult, LeftOutHeads
from esdtool.analysis.means import Mean
from esdtool.analysis.module_record import ModuleResult
from esdtool.analysis.record import Record
from esdtool.errors import CheckpointError
from esdtool.modules.skipped import SkipKind
from esdtool.spectra.options import TrapsName
from esdtool.spectra.vector_records import flat_vectors
from esdtool.support.csv_text import csv_text
from esdtool.support.json_text import JsonTextError, model_json, parse_json
from esdtool.support.words import dimensions

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas

    from esdtool.analysis.observation import Observation

FORMAT: Final = "esdtool.analysis"
VERSION: Final = 1


class Source(Record):
    """The origin of the weights."""

    checkpoint: str = Field(description="Path or Hub id as the user gave it; 'memory' for a live model.")
    revision: str | None = Field(default=None, description="Commit of a Hub checkpoint.")
    model_type: str | None = Field(default=None, description="model_type of config.json, e.g. 'llama'.")
    files: tuple[str, ...] = Field(default=(), description="Weight files read, relative to the checkpoint.")
    base: str | None = Field(
        default=None, description="Checkpoint whose weights were subtracted: the analysis is of the differences."
    )
    merged_with: str | None = Field(default=None, description="Checkpoint into which an adapter was merged.")
    merged_from: tuple[str, ...] | None = Field(
        default=None, description="Checkpoints that were merged into this one, as the user said."
    )


class Settings(Record):
    """Everything that the numbers depend on, besides the weights."""

    fit: tuple[str, ...] = Field(description="Estimators of alpha; the first one gives 'alpha'.")
    k_fraction: float = Field(description="Fraction of the eigenvalues in the tail of the Hill estimator.")
    min_eigs: int = Field(description="Modules with fewer eigenvalues are not scored.")
    spectrum: Literal["auto", "gram", "svd", "slq"] = Field(
        description="Path to the eigenvalues that was asked for; 'slq': estimates where they save time."
    )
    fast: bool = Field(description="Whether the guarded float32 path was allowed.")
    filter_zeros: bool = Field(
        default=False, description="Whether eigenvalues of at most 1e-5 were left out of the fits."
    )
    fix_finger_bound: Literal["linear", "legacy"] = Field(default="linear")
    farms_rows: int | None = Field(default=None, description="Rows of a FARMS window.")
    farms_ratio: float | None = Field(default=None, description="Columns over rows of a FARMS window.")
    farms_windows: int | None = Field(default=None, description="FARMS windows per dimension.")
    traps: TrapsName = Field(
        default="law", description="How correlation traps were counted: 'law', or 'shuffle' for a draw as well."
    )
    seed: int | None = Field(default=None, description="Seed of the draws; null where nothing was drawn.")
    vectors: bool = Field(default=False, description="Whether singular vectors were computed.")
    distances: bool = Field(
        default=False, description="Whether the singular vectors were compared with those of the base."
    )
    intruder_vectors: int | None = Field(
        default=None, description="Largest singular vectors among which intruder dimensions were sought."
    )
    intruder_similarity: float | None = Field(
        default=None, description="|Cosine| with a vector of the base below which a vector is an intruder."
    )
    per_head: bool = Field(default=False, description="Whether attention heads were analysed.")
    split_fused: bool = Field(default=True, description="Whether fused projections were split into modules.")
    split: tuple[str, ...] = Field(
        default=(), description="How the user said that tensors are split, each as 'REGEX=LAYOUT'."
    )
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    sample_layers: int | None = Field(
        default=None, description="Number of layers, evenly by depth, that were analysed as a sample; null: all layers."
    )


class SkippedResult(Record):
    """A tensor that is left out, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: SkipKind = Field(default=SkipKind.OTHER, description="What the tensor is.")
    reason: str = Field(description="Why it is left out, in words.")


_MEANS: Final = "Means of the measures that the literature quotes for a whole model, by their keys in a module."


class RoleSummary(Record):
    """Alphas of all scored modules of one role (the paper's figure 1), and means over all its modules."""

    role: str
    count: int
    mean_alpha: float
    std_alpha: float = Field(description="Population standard deviation over the modules.")
    min_alpha: float
    max_alpha: float
    mean_mp_alpha: float | None
    means: dict[str, Mean] = Field(default_factory=dict, description=_MEANS)


class LayerSummary(Record):
    """Alphas of all scored modules of one block."""

    layer: int
    count: int
    mean_alpha: float


class Summary(Record):
    """The analysis in a few numbers."""

    num_modules: int
    num_scored: int
    num_skipped: int
    mean_alpha: float | None = None
    means: dict[str, Mean] = Field(default_factory=dict, description=_MEANS)
    by_role: tuple[RoleSummary, ...] = ()
    by_layer: tuple[LayerSummary, ...] = ()
    most_heavy_tailed: tuple[str, ...] = Field(default=(), description="Names, heaviest tail first, at most 3.")
    least_heavy_tailed: tuple[str, ...] = Field(default=(), description="Names, lightest tail first, at most 3.")


class Analysis(Record):
    """The spectra of one checkpoint."""

    format: Literal["esdtool.analysis"] = FORMAT
    version: Literal[1] = VERSION
    created_by: str
    source: Source
    settings: Settings
    findings: tuple[Finding, ...] | None = Field(
        default=None, description="What is wrong or worth knowing, the gravest first; null where nobody looked."
    )
    modules: tuple[ModuleResult, ...]
    skipped: tuple[SkippedResult, ...] = ()
    heads: tuple[HeadResult, ...] = Field(
        default=(), description="Attention heads, with the option per_head; no part of modules, summary or findings."
    )
    heads_left_out: tuple[LeftOutHeads, ...] = Field(
        default=(), description="Attention blocks whose heads are not analysed."
    )
    summary: Summary

    # Not part of the file: `esdtool analyze --esd` saves them.
    _esds: dict[str, npt.NDArray[np.float64]] = PrivateAttr(default_factory=dict)
    _observations: Mapping[str, Observation] = PrivateAttr(default_factory=dict)

    @property
    def esds(self) -> dict[str, npt.NDArray[np.float64]]:
        """Eigenvalues [num_eigs] of each module by name, ascending; empty if the analysis was read from a file."""
        return self._esds

    def with_esds(self, esds: dict[str, npt.NDArray[np.float64]]) -> Self:
        """Return the same analysis with eigenvalues attached."""
        copy = self.model_copy()
        copy._esds = esds
        return copy

    @property
    def observations(self) -> Mapping[str, Observation]:
        """What was noticed about each module's weights, by name; empty if the analysis was read from a file."""
        return self._observations

    def with_observations(self, observations: Mapping[str, Observation]) -> Self:
        """Return the same analysis with observations attached."""
        copy = self.model_copy()
        copy._observations = observations
        return copy

    @property
    def scored(self) -> tuple[ModuleResult, ...]:
        """The modules whose status is 'ok'."""
        return tuple(module for module in self.modules if module.ok)

    def to_json(self) -> str:
        """Write the analysis as indented JSON with a final newline; the same input gives the same text."""
        return model_json(self)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read an analysis that `to_json` wrote.

        Raises:
            CheckpointError: if the file is missing, is no JSON, or is no analysis of version 1.
        """
        return read_document(path, cls, format_name=FORMAT, version=VERSION, what="analysis")

    def to_csv(self) -> str:
        """Write one line a module; columns are the JSON's module keys, nested values flattened (`alphas.ks`).

        Attention heads, where they were analysed, come last; the column `head` is empty for all others.
        """
        rows = self.flat_rows()
        return csv_text(list(rows[0]) if rows else [], rows)

    def to_pandas(self) -> pandas.DataFrame:
        """Make a table of one row a module, columns as in `to_csv`. Needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Analysis.to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.flat_rows())

    def flat_rows(self) -> list[dict[str, Any]]:
        """Make one dictionary a module, for tables; then one an attention head, if there are any."""
        rows = []
        any_distances = any(module.distances is not None for module in self.modules)
        for module in self.modules:
            row: dict[str, Any] = module.model_dump(
                exclude={
                    *("alphas", "alpha_ci", "fits", "comparisons", "traps", "vectors", "distances"),
                    *("shape", "parameter_shape", "trained"),
                }
            )
            row["alpha_ci.low"], row["alpha_ci.high"] = module.alpha_ci or (None, None)
            row["shape"] = dimensions(module.shape)
            for fit in self.settings.fit:
                row[f"alphas.{fit}"] = module.alphas.get(fit)
            if self.settings.vectors:
                row |= flat_vectors(module.vectors)
            if any_distances:
                for name in quantity_names(cheap_only=not self.settings.distances):
                    row[f"distances.{name}"] = None if module.distances is None else module.distances.measure(name)
            rows.append(row)
        if self.settings.per_head:
            head_rows = [head.flat_row() for head in self.heads]
            columns = dict.fromkeys(column for row in (*rows[:1], *head_rows[:1]) for column in row)
            rows = [columns | row for row in (*rows, *head_rows)]
        return rows


Document = TypeVar("Document", bound=Record)


def read_document(path: str | Path, kind: type[Document], *, format_name: str, version: int, what: str) -> Document:
    """Read one of esdtool's JSON files.

    Args:
        path: the file.
        kind: its model.
        format_name: value of its key `format`.
        version: value of its key `version`.
        what: the file in a word, for errors.

    Raises:
        CheckpointError: if the file is missing, is no JSON, or is something else.
    """
    try:
        document = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the {what}: {error.strerror}") from error
    except JsonTextError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != format_name:
        raise CheckpointError(f'{path}: not an esdtool {what} (no "format": "{format_name}")')
    if document.get("version") != version:
        raise CheckpointError(
            f"{path}: {what} version {document.get('version')!r} is not supported (this esdtool reads {version})"
        )
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: invalid {what} at {where}: {first['msg']}") from error
