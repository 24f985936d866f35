"""Sparklines: a row of blocks that fits in a cell of a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Final

import numpy as np
import numpy.typing as npt
from rich.text import Text

from esdtool.analysis.document import Analysis
from esdtool.analysis.module_record import ModuleResult
from esdtool.report.tables.density import drawn_fit, esd_histogram
from esdtool.report.tables.experts import starred
from esdtool.support.terminal import can_encode

Vector = npt.NDArray[np.float64]

BLOCKS: Final = "▁▂▃▄▅▆▇█"
ASCII: Final = "_.:-=+*#"
ESD_BINS: Final = 18

_TAIL_MARK = "|"
_TAIL_STYLE = "bold cyan"


def ramp_for(encoding: str) -> str:
    """Eight characters of rising height: blocks, or ASCII where the encoding has none."""
    return BLOCKS if can_encode(BLOCKS, encoding) else ASCII


def sparkline(values: Sequence[float | None], *, ramp: str = BLOCKS, zero: float | None = None) -> str:
    """Return one character a value, from the smallest to the largest; a blank for None.

    >>> sparkline([1, 2, None, 8])
    '▁▂ █'
    >>> sparkline([0, 1, 4], zero=0)
    ' ▃█'
    >>> sparkline([3, 3])
    '▄▄'

    Args:
        values: [n].
        ramp: the characters, lowest first.
        zero: bottom of the scale, if it is not the smallest value; values at it are blank.
    """
    known = [value for value in values if value is not None]
    if not known:
        return " " * len(values)
    low, high = min(known) if zero is None else zero, max(known)
    top = len(ramp) - 1

    def character(value: float | None) -> str:
        if value is None or (zero is not None and value <= zero):
            return " "
        if high <= low:
            return ramp[top // 2]
        return ramp[min(int((value - low) / (high - low) * len(ramp)), top)]

    return "".join(map(character, values))


def shortened(values: Sequence[float | None], length: int) -> list[float | None]:
    """At most `length` values: means of neighbours where there are more.

    >>> shortened([1, 3, 5, None, None, None], 3)
    [2.0, 5.0, None]
    """
    if len(values) <= length:
        return list(values)
    edges = [round(position * len(values) / length) for position in range(length + 1)]
    groups = ([value for value in values[start:end] if value is not None] for start, end in pairwise(edges))
    return [fmean(group) if group else None for group in groups]


def esd_sparkline(eigenvalues: npt.ArrayLike, xmin: float | None, *, ramp: str = BLOCKS, bins: int = ESD_BINS) -> Text:
    """Return an ESD on a logarithmic axis: a block's height is the number of eigenvalues in its bin.

    Args:
        eigenvalues: [n], any order; nothing is drawn without a positive one.
        xmin: the smallest eigenvalue of the tail; before its bin stands a `|`, and the tail is coloured.
        ramp: the characters, lowest first.
        bins: characters, the mark aside.
    """
    values = np.asarray(eigenvalues, dtype=np.float64)
    if values.size == 0 or not values.max() > 0:
        return Text("")
    histogram = esd_histogram(values, bins=bins)
    drawn = sparkline([int(count) for count in histogram.counts], ramp=ramp, zero=0)
    if xmin is None:
        return Text(drawn)
    # The bin that holds xmin; rounding must not push an xmin that is an edge into the bin before.
    start = int(np.searchsorted(histogram.edges, xmin * (1 + 1e-9), side="right")) - 1
    start = min(max(start, 0), bins)
    return Text.assemble(drawn[:start], (_TAIL_MARK, _TAIL_STYLE), (drawn[start:], _TAIL_STYLE))


def esds_of_rows(analysis: Analysis, rows: Iterable[ModuleResult]) -> dict[str, tuple[Vector, float | None]]:
    """(eigenvalues, xmin) by the row's name. A row of several experts has theirs pooled, and no xmin."""
    pooled: dict[str, list[Vector]] = {}
    for module in analysis.modules:
        if module.expert is not None and module.ok and module.name in analysis.esds:
            pooled.setdefault(starred(module.name, module.expert), []).append(analysis.esds[module.name])
    found: dict[str, tuple[Vector, float | None]] = {}
    for row in rows:
        fit = drawn_fit(row)
        if row.name in analysis.esds:
            found[row.name] = analysis.esds[row.name], None if fit is None else fit[1].xmin
        elif (name := row.name.rsplit(" (", 1)[0]) in pooled:
            found[row.name] = np.concatenate(pooled[name]), None
    return found
