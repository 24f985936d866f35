"""The table of the AlphaDecay paper from any runs: a row for each policy, a column for each base decay."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from esdtool.comparison.paired import Paired
from esdtool.comparison.runs import BASE, ComparisonTable, SettingRow, described
from esdtool.support.csv_text import csv_text
from esdtool.support.numbers import error_decimals, with_error


@dataclass(frozen=True, kw_only=True)
class PolicyRow:
    """One policy, with whatever else sets it apart, at each base decay."""

    label: str
    cells: tuple[SettingRow | None, ...]
    """The setting at each of the table's base decays; that without decay or with a predicted one is in each column."""


@dataclass(frozen=True, kw_only=True)
class PolicyTable:
    """Rows in the order of their best mean."""

    bases: tuple[float, ...]
    """The columns; empty if all runs have one base decay: then there is one column without a name."""
    rows: tuple[PolicyRow, ...]

    @property
    def headings(self) -> tuple[str, ...]:
        """The headings of the columns of `shown`."""
        return (
            "policy",
            *(f"{base:g}" for base in self.bases or ()),
            *(() if self.bases else ("perplexity",)),
            "seeds",
        )

    def shown(self, bold: Callable[[str], str] = str) -> list[tuple[str, ...]]:
        """Write the cells as text: `mean ± standard error`, the best of each column through `bold`."""
        rows = []
        for row in self.rows:
            cells = [
                "-" if cell is None else bold(_mean(cell)) if self.is_best(column, cell) else _mean(cell)
                for column, cell in enumerate(row.cells)
            ]
            counts = [len(cell.seeds) for cell in row.cells if cell is not None]
            seeds = str(counts[0]) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"
            rows.append((row.label, *cells, seeds))
        return rows

    def is_best(self, column: int, cell: SettingRow) -> bool:
        """Tell whether no policy has a lower mean at this base decay."""
        others = [row.cells[column] for row in self.rows]
        return all(cell.final_mean <= other.final_mean for other in others if other is not None)


def policy_table(settings: Sequence[SettingRow]) -> PolicyTable:
    """Arrange settings, which come with the best mean first."""
    bases = sorted({base for row in settings if (base := _base(row)) is not None})
    found: dict[str, tuple[str, dict[float | None, SettingRow]]] = {}
    for row in settings:
        rest = {key: value for key, value in row.setting.items() if key != BASE or isinstance(value, str)}
        key = json.dumps([row.policy, rest], sort_keys=True)
        found.setdefault(key, (described(row.policy, rest), {}))[1].setdefault(_base(row), row)
    columns: Sequence[float | None] = bases or [None]
    return PolicyTable(
        bases=tuple(bases),
        rows=tuple(
            PolicyRow(label=label, cells=tuple(by_base.get(base, by_base.get(None)) for base in columns))
            for label, by_base in found.values()
        ),
    )


def _mean(row: SettingRow) -> str:
    return with_error(row.final_mean, row.final_standard_error)


def paired_rows(settings: Sequence[SettingRow], *, averaged: bool = False) -> list[tuple[str, ...]]:
    """Cells under `PAIRED_HEADINGS`, of each setting that has a counterpart.

    Args:
        settings: of the comparison.
        averaged: of the mean of the last weights instead of the final ones.
    """
    found = [(row, row.averaged_paired if averaged else row.paired) for row in settings]
    return [_paired(row.label, difference, row.mean_decay) for row, difference in found if difference is not None]


def _paired(label: str, found: Paired, mean_decay: float | None) -> tuple[str, ...]:
    decimals = error_decimals(found.standard_error)
    return (
        label,
        found.against,
        str(found.seeds),
        with_error(found.difference, found.standard_error, signed=True),
        f"{found.low:+.{decimals}f} to {found.high:+.{decimals}f}",
        *("-" if value is None else f"{value:.2g}" for value in (found.p_value, found.holm_p_value)),
        "-" if mean_decay is None else f"{mean_decay:.3g}",
    )


_CSV_FIELDS = (
    *("seeds", "mean", "standard_error", "is_best", "mean_decay"),
    *("against", "paired_seeds", "difference", "difference_standard_error", "low", "high", "p_value", "holm_p_value"),
    *("averaged_mean", "averaged_standard_error", "averaged_difference", "averaged_low", "averaged_high"),
)
PAIRED_HEADINGS = ("setting", "minus", "seeds", "difference", "95 % interval", "p", "p (Holm)", "mean decay")


def settings_csv(table: ComparisonTable) -> str:
    """Return one line per setting: what the tables show, unrounded."""
    keys = sorted({key for row in table.settings for key in row.setting})
    arranged = policy_table(table.settings)
    best = [
        cell
        for row in arranged.rows
        for column, cell in enumerate(row.cells)
        if cell is not None and arranged.is_best(column, cell)
    ]
    rows: list[dict[str, Any]] = []
    for row in table.settings:
        test = row.paired
        rows.append(
            {
                **row.setting,
                "policy": row.policy,
                "seeds": len(row.seeds),
                "mean": row.final_mean,
                "standard_error": row.final_standard_error,
                "is_best": row in best,
                "mean_decay": row.mean_decay,
                "averaged_mean": row.averaged_mean,
                "averaged_standard_error": row.averaged_standard_error,
            }
        )
        if test is not None:
            rows[-1] |= {
                "against": test.against,
                "paired_seeds": test.seeds,
                "difference": test.difference,
                "difference_standard_error": test.standard_error,
                "low": test.low,
                "high": test.high,
                "p_value": test.p_value,
                "holm_p_value": test.holm_p_value,
            }
        if (averaged := row.averaged_paired) is not None:
            rows[-1] |= {
                "averaged_difference": averaged.difference,
                "averaged_low": averaged.low,
                "averaged_high": averaged.high,
            }
    return csv_text(["policy", *keys, *_CSV_FIELDS], rows)


def _base(row: SettingRow) -> float | None:
    """Return the column of a setting: None without decay, and where the base is predicted for each run."""
    base = row.setting.get(BASE)
    return None if row.policy == "none" or isinstance(base, str) else base
