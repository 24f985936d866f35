"""Values as words for people."""

from __future__ import annotations

import unicodedata


def dimensions(shape: tuple[int, ...]) -> str:
    """A shape for people.

    >>> dimensions((4096, 11008))
    '4096x11008'
    """
    return "x".join(map(str, shape))


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that show nothing, turn the writing direction, or cannot be written as UTF-8."""


def visible(text: str) -> str:
    r"""The text with characters that hide, reorder others or cannot be encoded spelled out.

    >>> visible("a\u202eb"), visible("layers.0")
    ('a\\u202eb', 'layers.0')
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in _INVISIBLE else character
        for character in text
    )
