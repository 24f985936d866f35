"""Small drawings that need no script: the spread of a role, and alpha by depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from esdtool.report.html.colours import Scale
from esdtool.report.html.markup import Html, tag
from esdtool.report.html.table import scroller

_WIDTH, _HEIGHT = 720, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 40


def range_glyph(low: float, mean: float, high: float, null: float | None, *, ends: tuple[float, float]) -> Html:
    """Return a role's values on a line: smallest to largest, a dot at the mean, a tick at the untrained null.

    Args:
        low: smallest value.
        mean: of all.
        high: largest value.
        null: untrained value; None for no tick.
        ends: of the axis, the same for all roles; what lies beyond is drawn at its end.
    """
    x = _glyph_axis(ends)
    parts = [
        tag("line", x1=6, x2=154, y1=8, y2=8, class_="axis"),
        tag("line", x1=x(low), x2=x(high), y1=8, y2=8, class_="range"),
        tag("circle", cx=x(mean), cy=8, r=4, class_="mean"),
    ]
    if null is not None:
        parts.insert(1, tag("line", x1=x(null), x2=x(null), y1=1, y2=15, class_="null"))
    return tag("svg", parts, viewBox="0 0 160 16", class_="glyph", aria_hidden="true")


def shift_glyph(first: float | None, last: float | None, *, ends: tuple[float, float]) -> Html:
    """Draw where a value came from (hollow) and went (filled), on the axis of `range_glyph`."""
    x = _glyph_axis(ends)
    parts = [tag("line", x1=6, x2=154, y1=8, y2=8, class_="axis")]
    if first is not None and last is not None:
        parts.append(tag("line", x1=x(first), x2=x(last), y1=8, y2=8, class_="shift"))
    if first is not None:
        parts.append(tag("circle", cx=x(first), cy=8, r=3.5, class_="mean before"))
    if last is not None:
        parts.append(tag("circle", cx=x(last), cy=8, r=4, class_="mean"))
    return tag("svg", parts, viewBox="0 0 160 16", class_="glyph", aria_hidden="true")


def depth_chart(points: Sequence[tuple[int, float]], means: Sequence[tuple[int, float]], scale: Scale) -> Html:
    """Return alpha (up) by layer (across): a dot for each module, a line through the layers' means.

    Args:
        points: (layer, alpha) of each dot; those beyond the axis are hollow, at its end.
        means: (layer, mean alpha), ascending, at least two.
        scale: the axis covers it, and the means.
    """
    layers = [layer for layer, _ in means]
    ends = [scale.low, scale.high, *(value for _, value in means)]
    ticks = nice_ticks(min(ends), max(ends))
    low, high = ticks[0], ticks[-1]

    def x(layer: float) -> float:
        share = (layer - layers[0]) / (layers[-1] - layers[0])
        return round(_LEFT + 10 + share * (_WIDTH - _LEFT - _RIGHT - 20), 1)

    def y(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP), 1)

    bottom = _HEIGHT - _BOTTOM
    parts = []
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    for value in ticks:
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(value), y2=y(value), class_="grid"))
        parts.append(tag("text", f"{value:.{decimals}f}", x=_LEFT - 6, y=y(value) + 4, text_anchor="end"))
    step = math.ceil(len(layers) / 20)
    parts += [tag("text", str(layer), x=x(layer), y=bottom + 18, text_anchor="middle") for layer in layers[::step]]
    parts.append(tag("text", "layer", x=(_LEFT + _WIDTH - _RIGHT) / 2, y=bottom + 35, text_anchor="middle"))
    parts += [
        tag("circle", cx=x(layer), cy=y(value), r=3, class_="dot" if low <= value <= high else "dot beyond")
        for layer, value in points
    ]
    line = " ".join(f"{x(layer)},{y(value)}" for layer, value in means)
    parts.append(tag("polyline", points=line, class_="trend"))
    label = f"Mean alpha from {means[0][1]:.2f} in layer {layers[0]} to {means[-1][1]:.2f} in layer {layers[-1]}"
    drawing = tag("svg", parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", class_="depth", role="img", aria_label=label)
    return scroller(drawing, label="Chart of alpha by layer")


def _glyph_axis(ends: tuple[float, float]) -> Callable[[float], float]:
    low, span = ends[0], ends[1] - ends[0]

    def x(value: float) -> float:
        share = (value - low) / span if span > 0 else 0.5
        return round(6 + 148 * min(max(share, 0.0), 1.0), 1)

    return x


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover an interval.

    >>> nice_ticks(1.31, 1.78)
    [1.2, 1.4, 1.6, 1.8]
    >>> nice_ticks(2, 2 + 1e-12)
    [1.5, 2.0, 2.5]
    """
    if high - low <= 1e-8 * max(1.0, abs(high)):  # equal but for rounding
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]
