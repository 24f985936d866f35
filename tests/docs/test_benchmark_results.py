"""The comparison of recorded benchmark results."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.docs.pages import ROOT

COUNTS = ("findings", "weightwatcher-columns")
"""Results that say how often something was found: no measured number is in them."""

RESULTS = sorted(path for path in (ROOT / "benchmarks" / "results").glob("*.json") if path.stem not in COUNTS)


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compare")


def result(
    seconds: float, share: float, error: float = 1e-9, processor: str = "A", shape: str = "8x8"
) -> dict[str, Any]:
    row = {"shape": shape, "esdtool": {"seconds": seconds, "fraction of bound": share, "alpha error": error}}
    return {"machine": {"processor": processor, "cores": 2}, "rows": [row]}


def run(compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *documents: dict[str, Any]) -> int:
    paths = []
    for index, document in enumerate(documents):
        paths.append(str(tmp_path / f"{index}.json"))
        Path(paths[-1]).write_text(json.dumps(document))
    monkeypatch.setattr("sys.argv", ["compare.py", *paths])
    code: int = compare.main()
    return code


@pytest.mark.parametrize(
    ("new", "code"),
    [
        (result(1.05, 0.5), 0),
        (result(0.5, 0.9), 0),
        (result(1.2, 0.5), 1),
        (result(1.0, 0.4), 1),
        (result(1.0, 0.5, error=5e-9), 0),  # within a digit
        (result(1.0, 0.5, error=1e-6), 1),
        (result(9.0, 0.5, processor="B"), 0),  # another machine's seconds say nothing
        (result(0.1, 0.4, processor="B"), 1),
        (result(1.0, 0.5, shape="9x9"), 2),
        ({"rows": []}, 2),
    ],
)
def test_what_is_worse(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: dict[str, Any], code: int
) -> None:
    assert run(compare, tmp_path, monkeypatch, result(1.0, 0.5), new) == code


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_recorded_result_can_be_compared(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    document = json.loads(path.read_text())
    assert run(compare, tmp_path, monkeypatch, document, document) == 0


def test_a_file_that_is_no_result(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text("{")
    monkeypatch.setattr("sys.argv", ["compare.py", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert compare.main() == 2
    assert "a.json: cannot read the result" in capsys.readouterr().err
