"""The user's word that a tensor holds several projections, where no family is known that says it.

esdtool analyze model.pth --split 'Wqkv=interleaved'
esdtool.analyze("model.pth", split=["Wqkv=interleaved"])
select_modules(tensors, split=[SplitRequest(pattern="Wqkv", how=interleaved())])
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esdtool.errors import UsageError
from esdtool.modules import layouts
from esdtool.modules.layouts import Layout

_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
_HEADS = re.compile(r"(?P<heads>[1-9]\d*)(?:/(?P<key_value_heads>[1-9]\d*))?")


@dataclass(frozen=True, kw_only=True)
class SplitLayout:
    """The projections in a tensor, and where they lie."""

    name: str
    """The layout as the user writes it, e.g. `per-head:8/2`."""
    parts: tuple[str, ...]
    """Roles of the projections, in order."""
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class SplitRequest:
    """The user's word on the tensors whose names match a regular expression."""

    pattern: str
    """Searched in the names of parameters and of modules."""
    how: SplitLayout

    @property
    def words(self) -> str:
        """The request as it is written on the command line."""
        return f"{self.pattern}={self.how.name}"


def thirds(heads: int | None = None, key_value_heads: int | None = None) -> SplitLayout:
    """All queries, then all keys, then all values; of one size, or with fewer heads of keys and values.

    Args:
        heads: query heads; only needed where `key_value_heads` is given.
        key_value_heads: heads of the keys, and of the values.
    """
    if heads is None or key_value_heads is None:
        return SplitLayout(name="thirds", parts=_QUERY_KEY_VALUE, layout=layouts.equal)
    layout = functools.partial(layouts.contiguous_heads, heads=heads, key_value_heads=key_value_heads)
    return SplitLayout(name=f"thirds:{heads}/{key_value_heads}", parts=_QUERY_KEY_VALUE, layout=layout)


def per_head(heads: int, key_value_heads: int | None = None) -> SplitLayout:
    """Head after head, each with its query, its key and its value.

    Args:
        heads: query heads.
        key_value_heads: groups of heads that share a key and a value; a group has its queries, its key and its value.
            By default every head has its own.
    """
    groups = heads if key_value_heads is None else key_value_heads
    layout = functools.partial(layouts.grouped_heads, heads=heads, key_value_heads=groups)
    counts = f"{heads}" if key_value_heads is None else f"{heads}/{key_value_heads}"
    return SplitLayout(name=f"per-head:{counts}", parts=_QUERY_KEY_VALUE, layout=layout)


def interleaved() -> SplitLayout:
    """A row of a query, a row of a key and a row of a value in turn."""
    return SplitLayout(name="interleaved", parts=_QUERY_KEY_VALUE, layout=layouts.interleaved)


def gate_up() -> SplitLayout:
    """The gate's half of a gated MLP's first matrix, then the other."""
    return SplitLayout(name="gate-up", parts=("gate_proj", "up_proj"), layout=layouts.gate_up)


def up_gate() -> SplitLayout:
    """The half that is multiplied, then the half that goes through the activation."""
    return SplitLayout(name="up-gate", parts=("up_proj", "gate_proj"), layout=layouts.gate_up)


def gate_up_interleaved() -> SplitLayout:
    """A row of the gate and a row of the other half in turn."""
    return SplitLayout(name="gate-up-interleaved", parts=("gate_proj", "up_proj"), layout=layouts.alternating)


_PLAIN: dict[str, Callable[[], SplitLayout]] = {
    "thirds": thirds,
    "interleaved": interleaved,
    "gate-up": gate_up,
    "up-gate": up_gate,
    "gate-up-interleaved": gate_up_interleaved,
}
_WITH_HEADS: dict[str, Callable[[int, int | None], SplitLayout]] = {"thirds": thirds, "per-head": per_head}
LAYOUT_NAMES = ("thirds", "thirds:H/G", "per-head:H", "per-head:H/G", "interleaved", *list(_PLAIN)[2:])
"""What may stand for a layout: H is the number of heads, G that of the groups that share keys and values."""


def parse_split(text: str) -> SplitRequest:
    """Read `REGEX=LAYOUT`.

    >>> parse_split("attn.Wqkv=per-head:8").how.name
    'per-head:8'

    Raises:
        UsageError: if there is no `=`, or no such layout.
    """
    pattern, separator, name = text.rpartition("=")
    if not (separator and pattern):
        raise UsageError(f"--split {text!r}: write REGEX=LAYOUT, for example 'attn.Wqkv=thirds'")
    return SplitRequest(pattern=pattern, how=_layout(name, text))


def as_requests(split: Sequence[str | SplitRequest]) -> tuple[SplitRequest, ...]:
    """Turn what the user gives into requests; a string is read as `parse_split` does."""
    return tuple(parse_split(one) if isinstance(one, str) else one for one in split)


def _layout(name: str, text: str) -> SplitLayout:
    kind, colon, counts = name.partition(":")
    if not colon and kind in _PLAIN:
        return _PLAIN[kind]()
    heads = _HEADS.fullmatch(counts)
    if heads is None or kind not in _WITH_HEADS:
        raise UsageError(f"--split {text!r}: no layout {name!r}; there are {', '.join(LAYOUT_NAMES)}")
    groups = heads["key_value_heads"]
    return _WITH_HEADS[kind](int(heads["heads"]), None if groups is None else int(groups))
