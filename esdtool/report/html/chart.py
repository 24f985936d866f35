"""Small drawings that need no script: the spread of a role, and alpha by depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from esdtool.report.html.colours import Scale
from esdtool.report.html.markup import Html, joined, name_tag, shown, tag
from esdtool.report.html.table import scroller

_WIDTH, _HEIGHT = 720, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 40
_COLOURS = 7
"""The number of colours that report.css has for roles and curves."""


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


def depth_chart(
    points: Sequence[tuple[int, float, str]], means: Sequence[tuple[int, float]], scale: Scale, roles: Sequence[str]
) -> Html:
    """Return alpha (up) by layer (across): a mark for each module by its role, a line through the layers' means.

    Args:
        points: (layer, alpha, role) of each mark; those beyond the axis are hollow, at its end.
        means: (layer, mean alpha), ascending, at least two.
        scale: the axis covers it, and the means.
        roles: in the order of the legend, which names them if there are marks.
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
    for value, words in zip(ticks, tick_words(ticks), strict=True):
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(value), y2=y(value), class_="grid"))
        parts.append(tag("text", words, x=_LEFT - 6, y=y(value) + 4, text_anchor="end"))
    parts += [
        tag("text", str(layer), x=x(layer), y=bottom + 18, text_anchor="middle")
        for layer in whole_ticks(layers[0], layers[-1])
    ]
    parts.append(tag("text", "layer", x=(_LEFT + _WIDTH - _RIGHT) / 2, y=bottom + 35, text_anchor="middle"))
    parts.append(axis_title("alpha", 12, (_TOP + bottom) / 2))
    place = {role: index for index, role in enumerate(roles)}
    # In a narrow band of layers the marks of one role would hide those of the others.
    radius = 3.5 if len(layers) <= 48 else 2.5
    parts += [
        mark(place[role], x(layer), y(value), radius, hollow=not low <= value <= high) for layer, value, role in points
    ]
    line = " ".join(f"{x(layer)},{y(value)}" for layer, value in means)
    parts.append(tag("polyline", points=line, class_="trend"))
    label = f"Mean alpha from {means[0][1]:.2f} in layer {layers[0]} to {means[-1][1]:.2f} in layer {layers[-1]}"
    drawing = tag("svg", parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", class_="depth", role="img", aria_label=label)
    keys = [tag("li", [_key(index), name_tag(role)]) for role, index in place.items()]
    keys.append(tag("li", [_line_key(), "mean of the layer"]))
    legend = tag("ul", keys if points else keys[-1:], class_="keys")
    return joined([scroller(drawing, label="Chart of alpha by layer"), legend])


def mark(index: int, x: float, y: float, radius: float, *, hollow: bool = False, shape: int | None = None) -> Html:
    """Draw the n-th kind of mark: seven colours, then the same ones in another shape, unless the shape is chosen."""
    colours = f"k{index % _COLOURS}{' beyond' if hollow else ''}"
    shape = index // _COLOURS % 3 if shape is None else shape
    if shape == 0:
        return tag("circle", cx=x, cy=y, r=radius, class_=colours)
    if shape == 1:
        return tag("rect", x=x - radius, y=y - radius, width=2 * radius, height=2 * radius, class_=colours)
    corners = f"{x},{y - 1.3 * radius} {x + 1.3 * radius},{y + radius} {x - 1.3 * radius},{y + radius}"
    return tag("polygon", points=corners, class_=colours)


def _key(index: int) -> Html:
    return tag("svg", mark(index, 6, 6, 4), viewBox="0 0 12 12", aria_hidden="true", class_="key")


def _line_key() -> Html:
    line = tag("polyline", points="0,6 12,6", class_="trend")
    return tag("svg", line, viewBox="0 0 12 12", aria_hidden="true", class_="key")


def axis_title(words: str, x: float, y: float) -> Html:
    """Write the title of a vertical axis, from bottom to top."""
    return tag("text", words, transform=f"translate({x} {y}) rotate(-90)", text_anchor="middle")


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
    step = nice_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def whole_ticks(low: int, high: int, count: int = 12) -> list[int]:
    """Round whole numbers within an interval.

    >>> whole_ticks(0, 149), whole_ticks(3, 6)
    ([0, 20, 40, 60, 80, 100, 120, 140], [3, 4, 5, 6])
    """
    step = max(1, round(nice_step((high - low) / count)))
    return list(range(-(-low // step) * step, high + 1, step))


def tick_words(ticks: Sequence[float]) -> list[str]:
    """Write ticks with as many decimals as tell them apart.

    >>> tick_words([1.2, 1.4]), tick_words([0, 500, 1000])
    (['1.2', '1.4'], ['0', '500', '1000'])
    """
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return [shown(value, f".{decimals}f") for value in ticks]


def nice_step(rough: float) -> float:
    """Round a step up to 1, 2 or 5 times a power of ten.

    >>> nice_step(0.13), nice_step(12)
    (0.2, 20.0)
    """
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
