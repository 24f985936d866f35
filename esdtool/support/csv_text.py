"""CSV that a spreadsheet may open."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

FORMULA_SIGNS: Final = tuple("=+-@\t\r\uff1d\uff0b\uff0d\uff20")
"""Beginnings by which spreadsheets tell a formula, in either width."""


def csv_text(fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    r"""Write rows as CSV with a line of headings.

    Text that a spreadsheet would run as a formula gets an apostrophe in front: names come from files that anyone may
    have made. Numbers stay as they are.

    >>> csv_text(["name", "alpha"], [{"name": "=1+1", "alpha": -2.5}])
    "name,alpha\n'=1+1,-2.5\n"

    Args:
        fields: the columns, which are also the keys of the rows.
        rows: cells by column; None and missing ones are empty.
    """
    lines = [_line(fields), *(_line([row.get(field) for field in fields]) for row in rows)]
    return "".join(lines)


def _line(cells: Sequence[Any]) -> str:
    buffer = io.StringIO()
    # The csv module quotes what its own line end holds: with "\n" alone, a name could end a line with "\r".
    csv.writer(buffer, lineterminator="\r\n").writerow([_harmless(cell) for cell in cells])
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def _harmless(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_SIGNS) else cell
