"""Amounts of memory as people write and read them."""

from __future__ import annotations

import re
from typing import Final

from esdtool.errors import UsageError

_FACTORS: Final = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """Read a size such as `500MB`, `2GB` or `2GiB`, always in powers of 1024, as bytes.

    >>> parse_size("2GB"), parse_size("2 GiB"), parse_size("500 MB"), parse_size("0")
    (2147483648, 2147483648, 524288000, 0)

    Raises:
        UsageError: if the text is no size.
    """
    found = re.fullmatch(r"(?P<number>[\d.E_+-]+?)\s*(?:(?P<unit>[KMGT])I?)?B?", text.strip().upper())
    try:
        size = -1 if found is None else int(float(found["number"]) * _FACTORS.get(found["unit"], 1))
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise UsageError(f"not a size: {text!r}; write for example 500MB or 2GB")
    return size


def format_size(size: float) -> str:
    """Write an amount of memory in powers of 1024, with three digits.

    >>> format_size(2**31), format_size(5e6), format_size(5e8), format_size(0), format_size(2**40)
    ('2.00 GiB', '4.77 MiB', '477 MiB', '0.0 MiB', '1024 GiB')
    """
    amount, unit = (size / 2**30, "GiB") if size >= 2**30 else (size / 2**20, "MiB")
    decimals = 0 if amount >= 99.95 else 1 if amount >= 9.995 or amount < 1 else 2
    return f"{amount:.{decimals}f} {unit}"
