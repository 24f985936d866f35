"""Values as words for people."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence


def dimensions(shape: tuple[int, ...]) -> str:
    """Write a shape as people do.

    >>> dimensions((4096, 11008))
    '4096x11008'
    """
    return "x".join(map(str, shape))


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Write a number with its noun, in the plural unless it is one.

    >>> counted(1, "tensor"), counted(2000, "tensor"), counted(0, "entry", "entries")
    ('1 tensor', '2,000 tensors', '0 entries')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def listed(items: Iterable[object], most: int = 3) -> str:
    """Join the first items with commas and tell how many follow.

    >>> listed(["a", "b"]), listed("abcdef"), listed([])
    ('a, b', 'a, b, c and 3 more', '')
    """
    words = [str(item) for item in items]
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")


def first_of(items: Sequence[object]) -> str:
    """Name the first of several items, and say how many others there are.

    >>> first_of(["a"]), first_of(["a", "b", "c"])
    ('a', 'a (and 2 more)')
    """
    return str(items[0]) + others(items)


def others(items: Sequence[object]) -> str:
    """Say in brackets how many items there are besides the first, for the end of a sentence about that one.

    >>> others(["a", "b", "c"]), others(["a"])
    (' (and 2 more)', '')
    """
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that show nothing, turn the writing direction, or cannot be written as UTF-8."""

_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Characters that count as letters or symbols and show nothing."""


def visible(text: str) -> str:
    r"""Spell out the characters that hide, that reorder or overwrite others, or that cannot be encoded.

    This is what makes text of others (names of tensors, files, keys) fit to be shown to people.

    >>> visible("a\u202eb"), visible("\x1b[2J"), visible("layers.0")
    ('a\\u202eb', '\\x1b[2J', 'layers.0')
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if character in _BLANK or unicodedata.category(character) in _INVISIBLE
        else character
        for character in text
    )


def duration(seconds: float) -> str:
    """Put a time in words, to about two digits.

    >>> duration(0.2), duration(75), duration(600), duration(9000)
    ('under a second', '75 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "under a second"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
