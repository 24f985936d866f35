"""Colour scales of the heat maps, readable with any colour vision, and the ink that is readable on them."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Literal

from esdtool.report.html.markup import Html, shown, tag

ScaleName = Literal["s", "d"]
STEPS = 41
"""Colours of a scale; odd, so that a diverging one has a middle."""

_STOPS: dict[ScaleName, str] = {
    # cividis, from dark blue to yellow: made to look alike with and without red-green deficiency.
    "s": "00224e 003170 2a3f6d 434e6c 575d6d 6a6c71 7d7c78 918b78 a59c74 bcae6c d2c060 e9d34e fee838",
    # From blue over near-white to orange: the pair of hues that all common deficiencies tell apart.
    "d": "053061 1c5c9f 3783bb 6bacd1 a7d0e4 d7e8f1 f7f6f6 fde4c0 fdc57f ef9e3c d0730f aa5306 7f3b08",
}
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)

Rgb = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Values to colours. Values beyond the ends get the colour of the end."""

    low: float
    high: float
    name: ScaleName = "s"
    clipped_low: bool = False
    """Whether values lie below `low`."""
    clipped_high: bool = False
    """Whether values lie above `high`."""

    def css_class(self, value: float) -> str:
        """Return the class of a cell that shows this value."""
        span = self.high - self.low
        share = (value - self.low) / span if span > 0 else 0.5
        return f"{self.name}{round(min(max(share, 0.0), 1.0) * (STEPS - 1))}"

    def legend(self, *, left: str, right: str, spec: str = ".2f") -> Html:
        """Return a strip of the colours between its ends in numbers and words."""
        width = 4
        strip = [
            tag("rect", x=step * width, y=0, width=width + 1, height=12, fill=hex_colour(colour))
            for step, colour in enumerate(scale_colours(self.name))
        ]
        low = ("≤ " if self.clipped_low else "") + shown(self.low, spec)
        high = ("≥ " if self.clipped_high else "") + shown(self.high, spec)
        return tag(
            "p",
            [
                tag("span", [f"{left} ", tag("b", low)]),
                tag("svg", strip, viewBox=f"0 0 {STEPS * width} 12", aria_hidden="true", class_="strip"),
                tag("span", [tag("b", high), f" {right}"]),
            ],
            class_="legend",
        )


def sequential(values: Sequence[float]) -> Scale:
    """Return a scale over the values; a few far from all others do not stretch it.

    Args:
        values: at least one, finite.
    """
    low, high = min(values), max(values)
    if len(values) < 8:
        return Scale(low=low, high=high)
    first, _, third = quantiles(values, n=4)
    reach = 3 * (third - first)
    ordered = sorted(values)
    # The ends are values: the outermost within reach of the quartiles.
    inner_low = ordered[bisect.bisect_left(ordered, first - reach)]
    inner_high = ordered[bisect.bisect_right(ordered, third + reach) - 1]
    return Scale(low=inner_low, high=inner_high, clipped_low=low < inner_low, clipped_high=high > inner_high)


def diverging(values: Sequence[float]) -> Scale:
    """Return a scale around zero, as far to either side as the middle of the values' sizes asks for."""
    if not values:
        return Scale(low=-1.0, high=1.0, name="d")
    reach = sequential([abs(value) for value in values]).high or 1.0
    return Scale(low=-reach, high=reach, name="d", clipped_low=min(values) < -reach, clipped_high=max(values) > reach)


def scale_colours(name: ScaleName) -> list[Rgb]:
    """[STEPS] colours from low to high."""
    stops = [_rgb(stop) for stop in _STOPS[name].split()]
    colours = []
    for step in range(STEPS):
        place = step / (STEPS - 1) * (len(stops) - 1)
        left = min(int(place), len(stops) - 2)
        colours.append(_mix(stops[left], stops[left + 1], place - left))
    return colours


def ink(background: Rgb) -> Rgb:
    """Return the text colour with the larger contrast: 4.5 to 1 at least on any background."""
    return max((_BLACK, _WHITE), key=lambda text: contrast(text, background))


def contrast(one: Rgb, other: Rgb) -> float:
    """WCAG 2 contrast ratio of two colours, 1 to 21.

    >>> round(contrast((0, 0, 0), (255, 255, 255)), 3)
    21.0
    """
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def scale_css() -> str:
    """Return a rule for each colour of each scale: the page's policy admits no colours in attributes of style."""
    names: tuple[ScaleName, ...] = ("s", "d")
    return "".join(
        f".{name}{step}{{background:{hex_colour(colour)};color:{hex_colour(ink(colour))}}}\n"
        for name in names
        for step, colour in enumerate(scale_colours(name))
    )


def hex_colour(colour: Rgb) -> str:
    """`#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _rgb(text: str) -> Rgb:
    red, green, blue = bytes.fromhex(text)
    return red, green, blue


def _mix(one: Rgb, other: Rgb, share: float) -> Rgb:
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _luminance(colour: Rgb) -> float:
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (c / 255 for c in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
