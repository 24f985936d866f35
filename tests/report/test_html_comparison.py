"""The HTML report of a comparison: its numbers against the analyses, hostile names, and its table in a browser."""

from __future__ import annotations

import math
from typing import Any

import pytest

from esdtool.analysis.document import Analysis
from esdtool.analysis.run import analyze
from esdtool.comparison.checkpoints import CheckpointComparison, compare_analyses
from esdtool.report.html import comparison_page
from tests.conftest import llama_tensors
from tests.report.html_reader import Element, data_of, read_page, table_rows

MINUS = "\N{MINUS SIGN}"
GONE = "model.layers.1.mlp.up_proj"


def _renamed(analysis: Analysis, checkpoint: str) -> Analysis:
    return analysis.model_copy(update={"source": analysis.source.model_copy(update={"checkpoint": checkpoint})})


@pytest.fixture(scope="module")
def analyses() -> list[Analysis]:
    before = llama_tensors(2)
    after = {name: tensor**9 if "q_proj" in name else 1.01 * tensor for name, tensor in before.items()}
    del after[f"{GONE}.weight"]
    return [_renamed(analyze(before), "run/<b>first"), _renamed(analyze(after), "run/second")]


@pytest.fixture(scope="module")
def comparison(analyses: list[Analysis]) -> CheckpointComparison:
    return compare_analyses(analyses)


@pytest.fixture(scope="module")
def document(comparison: CheckpointComparison) -> Element:
    return read_page(comparison_page(comparison))


def _number(text: str) -> float:
    return float(text.replace(MINUS, "-"))


def _alphas(analyses: list[Analysis]) -> dict[str, tuple[float, float]]:
    first, second = ({m.name: m.alpha for m in analysis.modules} for analysis in analyses)
    return {name: (first[name], second[name]) for name in first if name in second}  # type: ignore[misc]


def test_opens_with_what_moved(document: Element, analyses: list[Analysis]) -> None:
    alphas = _alphas(analyses)
    mean = math.fsum(after - before for before, after in alphas.values()) / len(alphas)
    lead = document.one("p", class_="lead").text
    assert lead.startswith("second: mean alpha ")
    assert f"{mean:+.3f}".replace("-", MINUS) + f" on average over {len(alphas)} modules in both" in lead
    errors = [{m.name: m.alpha_stderr or 0.0 for m in analysis.modules} for analysis in analyses]
    moved = [n for n, (a, b) in alphas.items() if abs(b - a) > 2 * math.hypot(errors[0][n], errors[1][n])]
    assert len(moved) == 2
    assert {name.rsplit(".", 1)[1] for name in moved} == {"q_proj"}
    assert "2 differ by more than 2 standard errors (2 with a heavier tail)." in lead
    assert document.one("h1").text == "Alphas compared: second against <b>first"


def test_every_module_has_its_alphas_and_their_difference(document: Element, analyses: list[Analysis]) -> None:
    alphas = _alphas(analyses)
    rows = table_rows(document, "module-table")
    assert {row[0] for row in rows} == set(alphas)
    for name, before, after, difference, _, change, role, *_ in rows:
        expected = alphas[name]
        assert (before, after) == (f"{expected[0]:.3f}", f"{expected[1]:.3f}")
        assert _number(difference) == pytest.approx(expected[1] - expected[0], abs=6e-4)
        assert change == ("heavier" if role == "q_proj" else "within errors")


def test_the_map_colours_by_sign(document: Element, analyses: list[Analysis]) -> None:
    heat = document.one("table", class_="heat")
    layers = [int(head.text) for head in heat.one("thead").all("th")[1:]]
    alphas = _alphas(analyses)
    place = {(m.layer, m.role): m.name for m in analyses[0].modules}
    for row in heat.one("tbody").all("tr"):
        for layer, cell in zip(layers, row.all("td"), strict=True):
            name = place[layer, row.one("th").text]
            if name == GONE:
                assert cell.text == "\N{EN DASH}"
                continue
            expected = alphas[name][1] - alphas[name][0]
            assert _number(cell.text) == pytest.approx(expected, abs=6e-3)
            step = int(str(cell.attributes["class"]).removeprefix("d"))
            assert step == 20 or (step < 20) == (expected < 0)


def test_what_has_no_counterpart_is_listed(document: Element) -> None:
    rows = [[cell.text for cell in row.all("th") + row.all("td")] for row in document.all("tbody")[-1].all("tr")]
    assert rows == [[GONE, "<b>first", "172x64", "not in second"]]
    assert data_of(document) is None


def test_roles_stand_side_by_side(document: Element, analyses: list[Analysis]) -> None:
    part = next(table for table in document.all("table") if "Mean over all scored" in table.one("caption").text)
    rows = {row.one("th").text: [cell.text for cell in row.all("td")] for row in part.one("tbody").all("tr")}
    for side, analysis in enumerate(analyses):
        for summary in analysis.summary.by_role:
            assert rows[summary.role][1 + side] == f"{summary.mean_alpha:.3f}"
    assert rows["up_proj"][0] == "2 / 1"
    assert rows["q_proj"][0] == "2"


def test_more_checkpoints_have_a_column_each(analyses: list[Analysis]) -> None:
    document = read_page(comparison_page(compare_analyses([*analyses, _renamed(analyses[0], "run/third")])))
    assert len(document.all("p", class_="lead")) == 2
    assert len(document.all("table", class_="heat")) == 2
    header = [head.text for head in document.one("table", id="module-table").one("thead").all("th")]
    assert header[1:6] == ["<b>first", "second", "third", "Δ second", "Δ third"]
    for row in table_rows(document, "module-table"):
        assert row[5] == "+0.000"
    assert document.all("p", class_="lead")[1].text == "third: all 14 alphas are those of <b>first."


def test_notes_and_nothing_scored() -> None:
    tensors = llama_tensors(1)
    first, second = analyze(tensors, min_eigs=100), analyze(tensors, min_eigs=90)
    document = read_page(comparison_page(compare_analyses([first, second])))
    assert "no module is scored in both" in document.one("p", class_="lead").text
    assert "min_eigs" in document.one("header").one("ul").text
    assert document.all("table", class_="heat") == []


def test_in_a_browser(comparison: CheckpointComparison, opened: Any) -> None:
    page = opened(comparison_page(comparison), viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.get_by_role("button", name="Δ", exact=True).click()
    shown = page.locator("#module-table tbody tr td:nth-child(4)").all_inner_texts()
    assert [_number(text) for text in shown] == sorted(map(_number, shown))
    page.get_by_label("change", exact=True).select_option("heavier")
    assert page.locator("output").inner_text() == f"2 of {len(comparison.modules)} modules"
    page.get_by_role("link", name=comparison.summary.moved_most[0], exact=True).click()
    assert page.locator("tr:target th .name").inner_text() == comparison.summary.moved_most[0]
    assert page.locator(".open").count() == 0


def test_hostile_names_run_nothing(hostile: Analysis, opened: Any) -> None:
    page = opened(comparison_page(compare_analyses([hostile, hostile])))
    for button in page.locator(".sort").all():
        button.click()
    assert page.locator("#module-table tbody tr").count() == len(hostile.modules)
    assert page.evaluate("window.__pwned") is None
