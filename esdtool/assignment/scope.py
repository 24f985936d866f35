"""Which modules an assignment covers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final


def in_blocks(layers: Iterable[int | None]) -> list[bool]:
    """Which modules are assigned by default: those of numbered blocks; all of them if there are no such blocks.

    >>> in_blocks([None, 0, 1, None]), in_blocks([None, None])
    ([False, True, True, False], [True, True])
    """
    inside = [layer is not None for layer in layers]
    return inside if any(inside) else [True] * len(inside)


BASE_DECAY: Final = "base decay"
"""How the note of a module that could not be scored begins; the reason follows after a colon."""


OUTSIDE_BLOCKS: Final = "outside the numbered blocks; include it by name to assign it"
"""Why a module is left out by default."""
