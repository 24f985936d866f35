"""Values by role (down) and layer (across) as a table of coloured cells: the roles are few, the layers may be 150."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from esdtool.names import module_path, place_of_block
from esdtool.report.html.colours import Scale
from esdtool.report.html.markup import DASH, Content, Html, joined, name_tag, shown, tag
from esdtool.report.html.table import scroller

_ROOMY = 12
"""Layers that do not need the page's whole width."""

_NUMBERED = 32
"""Layers whose cells still hold a readable number in a window of a laptop's width."""

_GROUP = 10
"""Layers under one heading where there are more."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A module's number and where it belongs."""

    stack: str
    """The container of its layer: models with an encoder and a decoder number both from 0."""
    layer: int
    role: str
    value: float | None
    """None if the module has no number."""
    shade: float | None = None
    """What decides on the colour; None: the number itself."""


def stack_of(parameter: str, layer: int) -> str:
    """Name the container whose number is the parameter's layer.

    >>> stack_of("model.decoder.layers.3.self_attn.q_proj.weight", 3)
    'model.decoder.layers'
    """
    path = module_path(parameter)
    place = place_of_block(path, layer)
    return "" if place is None else ".".join(path[:place])


def heat_maps(places: Sequence[Place], scale: Scale, *, caption: str, spec: str = ".2f") -> Html:
    """Return one map for each stack of layers; modules in one cell are averaged.

    Args:
        places: at least one.
        scale: of the colours.
        caption: says what the numbers are.
        spec: format of the numbers.
    """
    stacks = list(dict.fromkeys(place.stack for place in places))
    maps = []
    for stack in stacks:
        own = [place for place in places if place.stack == stack]
        heading: Content = caption if len(stacks) == 1 else name_tag(stack)
        maps.append(_heat_map(own, scale, heading, spec))
    whole = tag("div", maps, class_="maps")
    return whole if len(stacks) == 1 else joined([tag("p", caption, class_="note"), whole])


def _heat_map(places: Sequence[Place], scale: Scale, caption: Content, spec: str) -> Html:
    roles = list(dict.fromkeys(place.role for place in places))
    layers = sorted({place.layer for place in places})
    cells: dict[tuple[int, str], list[Place]] = {}
    for place in places:
        cells.setdefault((place.layer, place.role), []).append(place)
    head = tag("tr", [tag("th", "layer", scope="col"), *_layer_heads(layers)])
    rows = [
        tag(
            "tr",
            [
                tag("th", name_tag(role), scope="row"),
                *(_cell(cells.get((layer, role)), scale, spec, f"{role} of layer {layer}") for layer in layers),
            ],
        )
        for role in roles
    ]
    body = [tag("caption", joined(caption)), tag("thead", head), tag("tbody", rows)]
    return scroller(tag("table", body, class_=_classes(len(layers))), label="Heat map, role by layer")


def _classes(layers: int) -> str:
    """Return the classes of a map; cells of many layers are too narrow for a number, which can be pointed at."""
    return "heat" if layers <= _ROOMY else "heat wide" if layers <= _NUMBERED else "heat wide dense"


def _layer_heads(layers: Sequence[int]) -> list[Html]:
    if len(layers) <= _NUMBERED:
        return [tag("th", str(layer), scope="col") for layer in layers]
    starts = range(0, len(layers), _GROUP)
    return [
        tag("th", str(layers[start]), scope="colgroup", colspan=min(_GROUP, len(layers) - start)) for start in starts
    ]


def _cell(places: Sequence[Place] | None, scale: Scale, spec: str, where: str) -> Html:
    if places is None:
        return tag("td", DASH, class_="none", title=f"{where}: no such module")
    values = [place.value for place in places if place.value is not None]
    if not values:
        return tag("td", "n/s", class_="none", title=f"{where}: not scored")
    mean = fmean(values)
    shades = [place.shade for place in places if place.value is not None and place.shade is not None]
    shade = fmean(shades) if shades else mean
    title = f"{where}: {shown(mean, spec)}"
    if shades:
        title += f", {100 * shade:.0f} % from random"
    if len(places) > 1:
        title += f", mean of {len(values)} modules"
    if len(values) < len(places):
        title += f", {len(places) - len(values)} more not scored"
    return tag("td", shown(mean, spec), class_=scale.css_class(shade), title=title)
