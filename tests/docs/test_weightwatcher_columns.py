"""The recorded comparison with WeightWatcher: columns agree, or have a reason on the page."""

from __future__ import annotations

import json

from esdtool.report.tables.weightwatcher import COLUMNS
from tests.docs.pages import ROOT

RECORD = json.loads((ROOT / "benchmarks" / "results" / "weightwatcher-columns.json").read_text())


def test_every_column_agrees_or_has_a_reason() -> None:
    differ = {
        name for name, column in RECORD["columns"].items() if column["reason"] is None and column["largest"] > 1e-9
    }
    assert differ == set()
    # Without --fit tpl there is no Lambda to compare.
    compared = {name for name, column in RECORD["columns"].items() if column["largest"] is not None}
    assert compared == set(COLUMNS) - {"Lambda"}


def test_every_column_is_on_the_page() -> None:
    page = (ROOT / "docs" / "comparison.md").read_text()
    assert [name for name in RECORD["columns"] if f"`{name}`" not in page] == []


def test_four_checkpoints_with_all_their_layers() -> None:
    assert len(RECORD["checkpoints"]) == 4
    for found in RECORD["checkpoints"].values():
        assert found["only weightwatcher"] == found["only esdtool"] == []
        assert found["columns"]["alpha"]["largest"] < 1e-12
