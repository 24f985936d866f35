"""`csv`: one line a parameter, for spreadsheets and data frames."""

from __future__ import annotations

from esdtool.assignment.allocation import VALUE_KEYS, Allocation, ValueDetail
from esdtool.assignment.writer import WriteOptions, Writer
from esdtool.support.csv_text import csv_text
from esdtool.support.words import dimensions


def _write(allocation: Allocation, options: WriteOptions) -> str:
    """Write the values that there are, each with its score, then role, layer, shape and note."""
    del options
    keys = allocation.keys
    columns = [column for key in keys for column in (key, f"{key}.score")]
    rows = []
    for name, entry in allocation.parameters.items():
        row: dict[str, object] = {"parameter": name, "role": entry.role, "layer": entry.layer, "note": entry.note}
        row["shape"] = None if entry.shape is None else dimensions(entry.shape)
        for key in keys:
            row[key] = getattr(entry, key)
            row[f"{key}.score"] = entry.details.get(key, ValueDetail()).score
        rows.append(row)
    return csv_text(
        ["parameter", *columns, "alpha", "role", "layer", "shape", "note"],
        [{"alpha": allocation.parameters[str(row["parameter"])].alpha, **row} for row in rows],
    )


WRITER = Writer(carries=frozenset(VALUE_KEYS), write=_write, reader="spreadsheets")
