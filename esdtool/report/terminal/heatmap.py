"""Show alpha by layer and role as a heat map in the terminal, shaded by the distance from random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esdtool.analysis.document import Analysis
from esdtool.report.terminal.console import has_colours, new_table
from esdtool.support.terminal import styled

SHADES: Final = "░▒▓█"
"""From far from random to near it, where there are no colours."""

_COLOURS: Final = ("#00224e", "#213b6e", "#4c556c", "#6c6e72", "#8e8978", "#b1a570", "#d9c55c", "#fee838")
"""From far from random to near it: cividis, which looks alike with and without red-green deficiency."""

_DARK: Final = 4
"""So many of the colours need white figures."""

_OUTLIERS = 0.02
"""Fraction of cells at either end that do not stretch the scale."""

_GAP = 2
"""Columns between two columns of a table, and at its edges together."""


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """One cell of the map."""

    alpha: float
    distance: float | None
    """From random; None where it is not known of all modules: alpha decides on the shade."""

    @property
    def shade(self) -> float:
        """Number that rises with the likeness to random."""
        return self.alpha if self.distance is None else -self.distance


Cells = Mapping[tuple[str, str], _Cell]
"""Cells by (row, column)."""


def alpha_heat_map(analysis: Analysis, console: Console) -> list[Table]:
    """Tables of mean alpha by layer and role, as wide as the console at most; none without numbered layers.

    Layers go down and roles across, unless only the other way fits. What is too wide either way comes in parts.
    """
    alphas: dict[tuple[int, str], list[float]] = {}
    distances: dict[tuple[int, str], list[float]] = {}
    known = True
    for module in analysis.scored:
        if module.layer is not None and module.alpha is not None:
            alphas.setdefault((module.layer, module.role), []).append(module.alpha)
            distances.setdefault((module.layer, module.role), []).append(module.null_distance or 0.0)
            known = known and module.null_distance is not None
    if not alphas:
        return []
    layers = [str(layer) for layer in sorted({layer for layer, _ in alphas})]
    roles = list(dict.fromkeys(role for _, role in alphas))
    down: Cells = {
        (str(key[0]), key[1]): _Cell(alpha=fmean(found), distance=fmean(distances[key]) if known else None)
        for key, found in alphas.items()
    }
    parts = _parts(roles, "layer", layers, down, console.width)
    if len(parts) > 1:
        across = {(role, layer): cell for (layer, role), cell in down.items()}
        other = _parts(layers, "role", roles, across, console.width)
        if len(other) == 1:
            return [_table(across, "role", roles, layers, console)]
    return [_table(down, "layer", layers, part, console) for part in parts]


def _parts(headings: Sequence[str], corner: str, rows: Sequence[str], cells: Cells, width: int) -> list[list[str]]:
    """Return the columns in runs that fit the width."""
    figures = max(len(_figure(cell.alpha)) for cell in cells.values()) + 1
    first = max(map(len, (corner, *rows))) + _GAP
    parts: list[list[str]] = [[]]
    used = first
    for heading in headings:
        needed = max(len(heading), figures) + _GAP
        if parts[-1] and used + needed > width:
            parts.append([])
            used = first
        parts[-1].append(heading)
        used += needed
    return parts


def _table(cells: Cells, corner: str, rows: Sequence[str], columns: Sequence[str], console: Console) -> Table:
    values = np.array([cell.shade for cell in cells.values()])
    low, high = (float(end) for end in np.quantile(values, (_OUTLIERS, 1 - _OUTLIERS)))
    coloured = has_colours(console)
    ends = "dark" if coloured else SHADES[0], "bright" if coloured else SHADES[-1]
    by_distance = all(cell.distance is not None for cell in cells.values())
    words = (
        (f"{-low:.0%} or more from random", f"{-high:.0%} or less")
        if by_distance
        else (f"{low:.2f} or less", f"{high:.2f} or more")
    )
    table = new_table(f"alpha by layer and role: {ends[0]} {words[0]}, {ends[1]} {words[1]}")
    table.add_column(corner, justify="right" if corner == "layer" else "left", no_wrap=True)
    for heading in columns:
        table.add_column(styled(heading), justify="right", no_wrap=True)
    for row in rows:
        shown = (_cell(cells.get((row, column)), low, high, len(column), coloured=coloured) for column in columns)
        table.add_row(styled(row), *shown)
    return table


def _cell(cell: _Cell | None, low: float, high: float, width: int, *, coloured: bool) -> Text:
    if cell is None:
        return styled("-")
    scale = _COLOURS if coloured else SHADES
    share = (cell.shade - low) / (high - low) if high > low else 0.0
    level = min(max(int(share * len(scale)), 0), len(scale) - 1)
    if not coloured:
        return styled(SHADES[level] + _figure(cell.alpha))
    return styled(
        f" {_figure(cell.alpha)}".rjust(width), style=f"{'white' if level < _DARK else 'black'} on {_COLOURS[level]}"
    )


def _figure(alpha: float) -> str:
    return f"{alpha:.2f}" if alpha < 100 else f"{alpha:.0f}"
