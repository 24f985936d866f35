"""The page on our study: every number in its tables and in its answer is what the recorded runs say."""

from __future__ import annotations

import csv
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "study.md"
RULED = {"answer", "primary", "averaged", "settings", "decays"}
"""Places of the page that show the perplexity of AlphaDecay with little text."""


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The scripts of the study, which import each other by their names."""
    names = ("comparisons", "blocks", "answer", "figure", "page", "record")
    monkeypatch.syspath_prepend(ROOT / "examples" / "study")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        del sys.modules[name]


def places(text: str) -> dict[str, str]:
    """What stands at each place."""
    return dict(re.findall(r"<!-- (?!end)(\w+) -->\n(.*?)\n<!-- end -->", text, re.DOTALL))


def test_the_page_is_what_the_records_give(study: SimpleNamespace) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert places(text).keys() == set(study.page.WRITERS)
    assert study.page.filled(text) == text, "run `python examples/study/page.py`"


def test_it_would_change_with_them(study: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worse results of one setting, by 3 %, show in the answer and in each table that the setting is in."""
    text = PAGE.read_text(encoding="utf-8")
    worse = [
        line | {column: str(1.03 * float(line[column])) for column in ("final_perplexity", "averaged_perplexity")}
        if (line["regime"], line["sweep"], line["setting"]) == ("limited", "compare", "alphadecay")
        else line
        for line in study.comparisons.RUNS
    ]
    before = study.comparisons.ruled()
    monkeypatch.setattr(study.comparisons, "RUNS", worse)
    after = study.comparisons.ruled()
    for one, other in zip(before, after, strict=True):
        concerned = one.group == study.comparisons.LIMITED and "alphadecay" in (one.rule.first, one.rule.second)
        shift = 2.956 if concerned else 0.0  # 100 ln 1.03
        assert other.look.difference == pytest.approx(one.look.difference + shift, abs=0.01)
    was, now = places(text), places(study.page.filled(text))
    assert {name for name in was if was[name] != now[name]} >= RULED


def test_every_run_is_recorded_once_and_no_seed_that_chose_a_base_is_compared(study: SimpleNamespace) -> None:
    runs = [tuple(line[key] for key in study.record.PLACE) for line in study.comparisons.RUNS]
    assert len(set(runs)) == len(runs)
    chose = ("search", "tune", "retune")
    tuned = {line["seed"] for line in study.comparisons.RUNS if line["sweep"] in chose}
    assert not tuned & {line["seed"] for line in study.comparisons.RUNS if line["sweep"] not in chose}


def test_every_comparison_of_a_rule_has_both_its_settings(study: SimpleNamespace) -> None:
    found = study.comparisons.ruled()
    assert {each.group.regime for each in found} == {"limited", "onepass"}
    assert all(each.look.seeds >= 4 for each in found)


def test_a_look_ends_where_all_intervals_are_narrow_enough(
    study: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs beyond the seeds at which the rules were met are not looked at."""
    rules = [study.comparisons.parse_rule("a - b: ci 1%")]
    group = study.comparisons.Group(regime="r", sweep="s")

    def lines(setting: str, values: list[float]) -> list[dict[str, str]]:
        place = {"regime": "r", "sweep": "s", "setting": setting}
        return [place | {"seed": str(seed), "final_perplexity": str(value)} for seed, value in enumerate(values)]

    noisy, narrow = [2.0, 2.2, 2.0, 2.2, 2.0, 2.2], [2.0, 2.001, 2.0, 2.001, 2.0, 2.001]
    for values, seeds in ((noisy, 6), (narrow, 4)):
        monkeypatch.setattr(study.comparisons, "RUNS", [*lines("a", values), *lines("b", [2.0] * 6)])
        assert study.comparisons.last_look(group, rules, (4, 6, 8)) == seeds
    monkeypatch.setattr(study.comparisons, "RUNS", [*lines("a", noisy[:3]), *lines("b", [2.0] * 6)])
    assert study.comparisons.last_look(group, rules, (4, 6, 8)) is None


def test_the_record_outlives_the_folders(study: SimpleNamespace, tmp_path: Path) -> None:
    record: ModuleType = study.record
    path, fields = tmp_path / "runs.csv", (*record.PLACE, "loss")

    def row(setting: str, seed: int, loss: float) -> dict[str, object]:
        return {"regime": "limited", "sweep": "compare", "setting": setting, "seed": seed, "loss": loss}

    record.write(path, fields, [row("b", 10, 1.0), row("b", 10, 0.5), row("b", 9, 2.0)])
    record.write(path, fields, [row("b", 10, 3.0), row("a", 0, 4.0)])
    with path.open(encoding="utf-8", newline="") as stream:
        found = [(line["setting"], line["seed"], line["loss"]) for line in csv.DictReader(stream)]
    assert found == [("a", "0", "4.0"), ("b", "9", "2.0"), ("b", "10", "3.0")]


def test_the_figure_has_a_line_for_every_comparison_of_a_rule(study: SimpleNamespace, tmp_path: Path) -> None:
    rows = study.figure.rows()
    assert len(rows) == len({row.label for row in rows})
    assert len(rows) > len(study.comparisons.ruled()) + len(study.comparisons.earlier())
    study.figure.draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
