"""A spreadsheet that opens our CSV finds text and numbers, and no formula."""

from __future__ import annotations

import csv
import io

import pytest

from esdtool.support.csv_text import csv_text


@pytest.mark.parametrize(
    "name", ["=1+1", '=HYPERLINK("http://x","y")', "+1", "-1+2", "@SUM(1)", "\tx", "\rx", "\uff1d1"]
)
def test_formulas_become_text(name: str) -> None:
    text = csv_text([name, "b"], [{name: name, "b": -1.5}, {name: None, "b": 1e-7}])
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows == [[f"'{name}", "b"], [f"'{name}", "-1.5"], ["", "1e-07"]]


def test_everything_else_is_what_the_csv_module_writes() -> None:
    rows = [{"a": 'x,"y"\nz', "b": -2, "c": True}, {"a": "", "b": 0.1, "c": None}]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["a", "b", "c"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    assert csv_text(["a", "b", "c"], rows) == buffer.getvalue()
