"""HTML from Python values: everything is escaped unless this module made it."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable

from esdtool.support.words import visible

_VOID = frozenset({"img", "meta"})


class Html(str):
    """Markup that is safe to put into a page as it is."""

    __slots__ = ()


_LONGEST = 240
"""Characters of a name; real ones stay far below."""

_TAIL = 18
"""Characters at the end of a name that always show: `self_attn.q_proj` and what stands before; report.css knows it."""

DASH = "\N{EN DASH}"
"""Where there is no number."""

Content = str | Iterable[str] | None


def escaped(content: str) -> Html:
    """Any text as HTML; what is HTML already stays."""
    return content if isinstance(content, Html) else Html(html.escape(visible(content)))


def joined(content: Content) -> Html:
    """Texts and markup, one after the other."""
    if content is None:
        return Html()
    if isinstance(content, str):
        return escaped(content)
    return Html("".join(map(escaped, content)))


def tag(name: str, content: Content = None, /, **attributes: str | int | float | bool | None) -> Html:
    """Return one element. `class_` stands for `class`, and `_` in names for `-`; None and False leave an attribute out.

    >>> tag("th", "a < b", scope="col", data_type="number")
    '<th scope="col" data-type="number">a &lt; b</th>'
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.removesuffix("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{escaped(str(value))}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening if name in _VOID else f"{opening}{joined(content)}</{name}>")


def name_tag(name: str) -> Html:
    """A name out of a checkpoint: unable to reorder its surroundings, broken at its dots and slashes where it must be.

    Of one so long that it would bury the page the middle is left out.
    """
    return tag("bdi", _broken(_bounded(name)), class_="name")


def cut_name(name: str) -> Html:
    """Return a name that keeps its beginning and its end where there is no room for all of it, as in a table.

    The style leaves out the end of `head`; the whole name stays in the page, to be copied, searched and pointed at.
    """
    name = visible(_bounded(name))
    if len(name) <= _TAIL:
        return name_tag(name)
    parts = [tag("span", name[:-_TAIL], class_="head"), tag("span", name[-_TAIL:], class_="tail")]
    return tag("bdi", parts, class_="name cut", title=name)


def _bounded(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 2 :]}"


def _broken(name: str) -> Html:
    return Html(re.sub(r"([./])", r"\1<wbr>", escaped(name)))


def shown(value: float, spec: str) -> str:
    r"""Return a number by a format, with a true minus sign.

    >>> shown(-0.251, "+.2f") == "\N{MINUS SIGN}0.25", shown(-0.001, "+z.2f")
    (True, '+0.00')
    """
    text = format(value, spec)
    return f"\N{MINUS SIGN}{text[1:]}" if text.startswith("-") else text


def rounded(value: float | None, digits: int = 6) -> float | int | None:
    """Return a number with few digits, to keep pages small; None for what JSON has no number for.

    >>> rounded(2.123456789), rounded(1e5), rounded(float("nan"))
    (2.12346, 100000, None)
    """
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
