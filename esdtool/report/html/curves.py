"""Curves over training as drawings that follow the page's colours, with their numbers under the pointer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from esdtool.report.html.chart import axis_title, mark, nice_ticks, tick_words
from esdtool.report.html.markup import Html, name_tag, shown, tag
from esdtool.report.html.table import scroller

_WIDTH, _HEIGHT = 720, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 12, 40
_MARKED = 40
"""Points of a curve that still get a mark each."""
_COLOURS, _DASHES = 7, 4


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart."""

    label: str
    points: tuple[tuple[float, float], ...]
    """(x, y), x ascending."""
    behind: tuple[tuple[tuple[float, float], ...], ...] = ()
    """Paler lines behind it, such as those of single seeds."""
    band: tuple[tuple[float, float, float], ...] = ()
    """(x, low, high) of a band behind it."""
    holds: bool = False
    """Whether a value holds until the next point: a line of steps."""


def line_chart(curves: Sequence[Curve], *, heading: str, across: str, up: str, digits: int = 4) -> Html:
    """Return curves with axes, a legend and, where scripts run, the values at the pointer.

    Curves that lie on one another are told apart: of those on top only dashes are drawn, and what is beneath shows
    between them; a legend's entry brings its curve out.

    Args:
        curves: at least one with a point.
        heading: says what is drawn.
        across: title of the horizontal axis.
        up: title of the vertical axis.
        digits: significant digits of the values that are told.
    """
    points = [
        point
        for curve in curves
        for line in (curve.points, *curve.behind, *([(x, y) for x, *ys in curve.band for y in ys],))
        for point in line
        if math.isfinite(point[1])
    ]
    axis_x = _whole([x for x, _ in points])
    ticks = nice_ticks(min(y for _, y in points), max(y for _, y in points), count=5)
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)

    def x_of(value: float) -> float:
        share = (value - low_x) / (high_x - low_x) if high_x > low_x else 0.5
        return round(_LEFT + 10 + share * (_WIDTH - _LEFT - _RIGHT - 20), 1)

    def y_of(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP), 1)

    bottom = _HEIGHT - _BOTTOM
    parts = []
    for value, words in zip(ticks, tick_words(ticks), strict=True):
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y_of(value), y2=y_of(value), class_="grid"))
        parts.append(tag("text", words, x=_LEFT - 6, y=y_of(value) + 4, text_anchor="end"))
    parts += [tag("text", f"{x:,.0f}", x=x_of(x), y=bottom + 18, text_anchor="middle") for x in axis_x]
    parts.append(tag("text", across, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=bottom + 35, text_anchor="middle"))
    parts.append(axis_title(up, 12, (_TOP + bottom) / 2))

    def path(line: Sequence[tuple[float, float]], *, holds: bool) -> str:
        places: list[str] = []
        for x, y in line:
            if holds and places:
                places.append(f"{x_of(x)},{places[-1].split(',')[1]}")
            places.append(f"{x_of(x)},{y_of(y)}")
        return " ".join(places)

    for index, curve in enumerate(curves):
        colour = f"c{index % _COLOURS}"
        drawn = []
        if curve.band:
            lows = path([(x, low) for x, low, _ in curve.band], holds=curve.holds)
            highs = path([(x, high) for x, _, high in curve.band], holds=curve.holds)
            around = " ".join([lows, *reversed(highs.split(" "))])
            drawn.append(tag("polygon", points=around, class_=f"band {colour}"))
        finite = [point for point in curve.points if math.isfinite(point[1])]
        drawn += [
            tag("polyline", points=path(line, holds=False), class_=f"pale {colour}")
            for line in curve.behind
            if all(math.isfinite(y) for _, y in line)
        ]
        dashes = f"l{index % _DASHES}"
        drawn.append(tag("polyline", points=path(finite, holds=curve.holds), class_=f"line {colour} {dashes}"))
        if len(finite) <= _MARKED and not curve.holds:
            drawn += [mark(index % _COLOURS, x_of(x), y_of(y), 3, shape=index % 3) for x, y in finite]
        parts.append(tag("g", drawn, class_="curve"))
    drawing = tag(
        "svg",
        parts,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        class_="lines",
        role="img",
        aria_label=heading,
        data_values=_values(curves, x_of, across, digits),
    )
    keys = [tag("li", [_key(index), name_tag(curve.label)]) for index, curve in enumerate(curves)]
    caption = tag("figcaption", heading)
    legend = tag("ul", keys, class_="keys")
    return tag("figure", [caption, scroller(drawing, label=heading), legend], class_="chart")


def _key(index: int) -> Html:
    line = tag("polyline", points="0,6 26,6", class_=f"line c{index % _COLOURS} l{index % _DASHES}")
    drawn = [line, mark(index % _COLOURS, 13, 6, 3, shape=index % 3)]
    return tag("svg", drawn, viewBox="0 0 26 12", aria_hidden="true", class_="key long-key")


def _whole(values: Sequence[float]) -> list[float]:
    """Ticks of a horizontal axis that counts something: whole, and within the data."""
    low, high = min(values), max(values)
    ticks = [tick for tick in nice_ticks(low, high, count=8) if low <= tick <= high and float(tick).is_integer()]
    return ticks or [low]


def _values(curves: Sequence[Curve], x_of: object, across: str, digits: int) -> str:
    """Return what the script tells of each place: [place, heading, [value of each curve, empty for none]]."""
    assert callable(x_of)
    known = [dict(curve.points) for curve in curves]
    places = sorted({x for curve in curves for x, _ in curve.points})

    def value_at(index: int, x: float) -> str:
        if curves[index].holds:
            before = [place for place in known[index] if place <= x]
            return _number(known[index][max(before)], digits) if before else ""
        return _number(known[index][x], digits) if x in known[index] else ""

    rows = [[x_of(x), f"{across} {x:,.0f}", [value_at(index, x) for index in range(len(curves))]] for x in places]
    return json.dumps(rows, separators=(",", ":"))


def _number(value: float, digits: int) -> str:
    return shown(value, f"#.{digits}g").removesuffix(".") if math.isfinite(value) else str(value)
