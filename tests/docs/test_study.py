"""The page on our study: every number in its tables and in its answer is what the recorded runs say."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_page", ROOT / "examples" / "study" / "page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_the_page_is_what_the_records_give(page: ModuleType) -> None:
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- (\w+) -->", text)) - {"end"} == set(page.BLOCKS)
    assert page.filled(text) == text, "run `python examples/study/page.py`"


def test_it_would_change_with_them(page: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worse results of one setting, by 3 %, show in the answer and in each table that the setting is in."""
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    worse = [
        line | {"final_perplexity": str(1.03 * float(line["final_perplexity"]))}
        if (line["sweep"], line["setting"]) == ("compare", "alphadecay")
        else line
        for line in page.RUNS
    ]
    before = {(first, second): look for first, second, _, look in page.primary()}
    monkeypatch.setattr(page, "RUNS", worse)
    after = {(first, second): look for first, second, _, look in page.primary()}
    for pair, look in after.items():
        shift = 2.956 if "alphadecay" in pair else 0.0  # 100 ln 1.03
        assert look.difference == pytest.approx(before[pair].difference + shift, abs=0.01)
    changed = page.filled(text)
    for name in ("answer", "primary", "settings", "exploratory"):
        found = [re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", each, re.DOTALL) for each in (text, changed)]
        assert found[0] is not None
        assert found[1] is not None
        assert found[0][1] != found[1][1], name


def test_every_run_of_the_comparison_is_paired_and_recorded_once(page: ModuleType) -> None:
    runs = [(line["sweep"], line["setting"], line["seed"]) for line in page.RUNS]
    assert len(set(runs)) == len(runs)
    tuned = {line["seed"] for line in page.RUNS if line["sweep"] in ("search", "tune")}
    compared = {line["seed"] for line in page.RUNS if line["sweep"] == "compare"}
    assert not tuned & compared  # no seed that chose a base decides between policies
