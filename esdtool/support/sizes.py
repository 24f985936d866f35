"""Amounts of memory as people write them."""

from __future__ import annotations

from esdtool.errors import UsageError


def parse_size(text: str) -> int:
    """Bytes of a size such as `500MB` or `2GB` (powers of 1024).

    >>> parse_size("2GB"), parse_size("500 MB"), parse_size("0")
    (2147483648, 524288000, 0)

    Raises:
        UsageError: if it is none.
    """
    cleaned = text.strip().upper().removesuffix("B").rstrip()
    factor = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(cleaned[-1:], 1)
    number = cleaned if factor == 1 else cleaned[:-1].rstrip()
    try:
        size = int(float(number) * factor)
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise UsageError(f"not a size: {text!r}; write for example 500MB or 2GB")
    return size


def format_size(size: float) -> str:
    """An amount of memory in three digits.

    >>> format_size(2**31), format_size(5e6), format_size(0)
    ('2.00 GB', '4.77 MB', '0.0 MB')
    """
    if size >= 2**30:
        return f"{size / 2**30:.3g} GB" if size >= 100 * 2**30 else f"{size / 2**30:.2f} GB"
    return f"{size / 2**20:.2f} MB" if size >= 2**20 else f"{size / 2**20:.1f} MB"
