"""The HTML report in a browser: what its script does, and what the page's policy lets nobody do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from esdtool.analysis.document import Analysis
from esdtool.report.html import analysis_page
from esdtool.report.tables.density import esd_histogram
from esdtool.support.words import visible

NO_OVERFLOW = "document.documentElement.scrollWidth <= window.innerWidth"
MINUS = "\N{MINUS SIGN}"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def report(analysis: Analysis) -> str:
    """The bundled checkpoint's report, in which one module has no alpha."""
    *others, last = analysis.modules
    unscored = last.model_copy(update={"status": "not scored for the test", "alpha": None})
    return analysis_page(analysis.model_copy(update={"modules": (*others, unscored)}).with_esds(analysis.esds))


def _alphas(page: Any) -> list[str]:
    return page.locator("#module-table tbody td.alpha").all_inner_texts()


def _head(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def test_sorts_both_ways_with_missing_last_and_returns(report: str, opened: Any) -> None:
    page = opened(report)
    original = _alphas(page)
    head = page.locator("#module-table thead th").filter(has=_head(page, "alpha"))
    assert head.get_attribute("aria-sort") == "none"
    for order, reverse in (("ascending", False), ("descending", True)):
        _head(page, "alpha").click()
        *numbers, last = _alphas(page)
        assert last == "\N{EN DASH}"
        assert [float(number) for number in numbers] == sorted(map(float, numbers), reverse=reverse)
        assert head.get_attribute("aria-sort") == order
        assert page.locator("th[aria-sort='ascending'], th[aria-sort='descending']").count() == 1
    _head(page, "alpha").click()
    assert _alphas(page) == original
    assert head.get_attribute("aria-sort") == "none"


def test_names_are_sorted_as_people_count(analysis: Analysis, opened: Any) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in (10, 9, 2)]
    modules = [m.model_copy(update={"name": name}) for m, name in zip(analysis.modules, names, strict=False)]
    summary = analysis.summary.model_copy(update={"most_heavy_tailed": (), "least_heavy_tailed": ()})
    page = opened(analysis_page(analysis.model_copy(update={"modules": tuple(modules), "summary": summary})))
    _head(page, "module").click()
    assert page.locator("#module-table tbody th .name").all_inner_texts() == names[::-1]


def test_all_can_be_reached_by_keyboard(report: str, opened: Any) -> None:
    page = opened(report)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    label = "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
    steps = []
    while not steps or steps[-1] != "alpha":
        page.keyboard.press("Tab")
        steps.append(page.evaluate(label))
        assert len(steps) < 60
    page.keyboard.press("Enter")
    numbers = [float(text) for text in _alphas(page)[:-1]]
    assert numbers == sorted(numbers)
    while not steps[-1].startswith("ESD of"):
        page.keyboard.press("Tab")
        steps.append(page.evaluate(label))
        assert len(steps) < 90
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    assert page.locator(".panel .esd div > svg").count() == 1


def test_filters_narrow_the_rows_and_the_count(report: str, analysis: Analysis, opened: Any) -> None:
    page = opened(report)
    rows = page.locator("#module-table tbody tr")
    total = len(analysis.modules)
    count = page.locator("output")
    assert count.inner_text() == f"{total} of {total} modules"
    page.get_by_label("Filter the rows").fill("LAYERS.1 proj")
    matching = [m for m in analysis.modules if "layers.1" in m.name and "proj" in m.name]
    assert rows.count() == len(matching) < total
    assert count.inner_text() == f"{len(matching)} of {total} modules"
    page.get_by_label("role", exact=True).select_option("q_proj")
    assert rows.count() == 1
    page.get_by_label("Filter the rows").fill("")
    page.get_by_label("role", exact=True).select_option("")
    page.get_by_label("verdict", exact=True).select_option("not scored")
    assert rows.locator("th .name").all_inner_texts() == [analysis.modules[-1].name]
    # A link out of the conclusion leads to its row even now.
    name = analysis.summary.most_heavy_tailed[0]
    page.get_by_role("link", name=name).click()
    assert page.locator("#module-table tbody tr:target th .name").inner_text() == name
    assert rows.count() == total


def test_a_row_opens_its_spectrum(report: str, analysis: Analysis, opened: Any) -> None:
    page = opened(report)
    module = analysis.modules[2]
    button = page.get_by_role("button", name=f"ESD of {module.name}")
    button.click()
    panel = page.locator("tr#m2 + tr .panel")
    counts = esd_histogram(analysis.esds[module.name]).counts
    assert panel.locator("figure div > svg rect.bar").count() == (counts > 0).sum()
    fit = module.fits["hill"]
    assert fit is not None
    assert f"alpha {fit.alpha:.3f} ± {fit.alpha_stderr:.2f} (hill)" in panel.locator("figcaption").inner_text()
    for part in ("tail", "mp", "xmin"):
        assert panel.locator(f"figure div > svg .{part}").count() == 1
    words = panel.inner_text()
    assert "eigenvalue λ of WᵀW" in words
    assert module.spectrum is not None
    assert module.spectrum in words
    lines = "[...document.querySelectorAll('figure div > svg polyline')]"
    inside = f"{lines}.every(line => [...line.points].every(point => point.y > 0))"
    assert page.evaluate(inside)
    # It stays beneath its row in any order.
    _head(page, "alpha").click()
    _head(page, "alpha").click()
    assert page.locator("tr#m2 + tr .panel").count() == 1
    button.click()
    assert page.locator(".panel").count() == 0
    page.get_by_role("button", name=f"ESD of {analysis.modules[-1].name}").click()
    assert "not scored for the test" in page.locator(".panel").inner_text()


def test_the_fitted_line_meets_the_density_of_the_fit(report: str, analysis: Analysis, opened: Any) -> None:
    """In the drawing's own axes: the tail starts at xmin and falls with slope -alpha."""
    page = opened(report)
    page.locator("tr#m0 .open").click()
    points = page.locator("figure div > svg polyline.tail").get_attribute("points")
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in points.split(" "))
    assert float(page.locator("figure div > svg line.xmin").get_attribute("x1")) == pytest.approx(x0, abs=0.01)
    ticks = page.evaluate(
        "[...document.querySelectorAll('.axes text')].filter(t => t.children.length)"
        ".map(t => [t.textContent, t.getAttribute('x'), t.getAttribute('y'), t.getAttribute('text-anchor')])"
    )
    across = {int(t[2:].replace(MINUS, "-")): float(x) for t, x, _, anchor in ticks if anchor == "middle"}
    up = {int(t[2:].replace(MINUS, "-")): float(y) for t, _, y, anchor in ticks if anchor == "end"}
    per_x = (max(across.values()) - min(across.values())) / (max(across) - min(across))
    per_y = (up[min(up)] - up[max(up)]) / (max(up) - min(up))
    slope = -((y1 - y0) / per_y) / ((x1 - x0) / per_x)
    assert slope == pytest.approx(-analysis.modules[0].fits["hill"].alpha, rel=0.01)  # type: ignore[union-attr]


def test_hostile_names_run_nothing_and_show_as_text(hostile: Analysis, opened: Any) -> None:
    page = opened(analysis_page(hostile))
    shown = page.locator("#module-table tbody th .name").all_text_contents()
    for module in hostile.modules:
        assert visible(module.name) in shown or len(module.name) > 240
    for button in page.locator(".open").all():
        button.click()
    page.locator("#module-table tbody th").first.hover()
    page.get_by_label("Filter the rows").fill("</script>")
    assert page.locator("#module-table tbody tr[id]").count() == 1
    assert page.evaluate("window.__pwned") is None


def test_markup_that_slipped_in_could_run_nothing(report: str, browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    hole = "<b onclick='window.__pwned=1'>x</b><script>window.__pwned=1</script><i style='color:red'>y</i>"
    path.write_text(report.replace("<header>", f"<header>{hole}"), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    page.locator("header > b").click()
    assert page.evaluate("window.__pwned") is None
    assert page.evaluate("document.querySelector('header > i').style.color") == ""
    assert page.locator(".theme").count() == 1  # while the page's own script does run
    page.close()


@pytest.mark.parametrize("name", ["report", "hostile"])
def test_fits_a_phone(name: str, opened: Any, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(name)
    page = opened(text if isinstance(text, str) else analysis_page(text), viewport={"width": 360, "height": 740})
    assert page.evaluate(NO_OVERFLOW)
    page.locator(".open").first.click()
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate(NO_OVERFLOW)
    panel = page.locator(".panel").first.bounding_box()
    assert panel["x"] >= 0
    assert panel["x"] + panel["width"] <= 360


def test_dark_scheme_and_the_button_for_it(report: str, opened: Any) -> None:
    page = opened(report, color_scheme="light")
    light = page.evaluate(BACKGROUND)
    page.get_by_role("button", name="Dark", exact=True).click()
    dark = page.evaluate(BACKGROUND)
    assert light == "rgb(255, 255, 255)"
    assert max(map(int, re.findall(r"\d+", dark))) < 64
    page.get_by_role("button", name="Light", exact=True).click()
    assert page.evaluate(BACKGROUND) == light
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(BACKGROUND) == light  # chosen on the page
    page.reload()
    assert page.evaluate(BACKGROUND) == dark


def test_print_has_no_controls_but_open_figures(report: str, opened: Any) -> None:
    page = opened(report, color_scheme="dark")
    page.locator(".open").first.click()
    page.emulate_media(media="print")
    assert page.evaluate(BACKGROUND) in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
    for control in (".theme", ".tools", ".open", ".skip"):
        assert not page.locator(control).first.is_visible(), control
    assert page.locator("figure div > svg").is_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('#module-table thead')).display") == (
        "table-header-group"
    )
    assert page.evaluate("getComputedStyle(document.querySelector('.scroll.tall')).overflowY") == "visible"


def test_without_a_script_everything_is_there(report: str, analysis: Analysis, opened: Any) -> None:
    page = opened(report, java_script_enabled=False)
    assert page.locator("#module-table tbody tr").count() == len(analysis.modules)
    assert page.locator("noscript").inner_text().startswith("Without JavaScript")
    assert page.locator("button").count() == 0


def test_a_long_table_shows_its_first_rows_and_all_on_demand(analysis: Analysis, opened: Any) -> None:
    modules = [
        analysis.modules[0].model_copy(update={"name": f"module.{i}", "alpha": float(2000 - i)}) for i in range(600)
    ]
    summary = analysis.summary.model_copy(
        update={"most_heavy_tailed": ("module.599",), "least_heavy_tailed": ("module.0",)}
    )
    large = analysis.model_copy(update={"modules": tuple(modules), "summary": summary})
    page = opened(analysis_page(large))
    rows = page.locator("#module-table tbody tr")
    assert rows.count() == 500
    assert page.locator("output").inner_text() == "600 of 600 modules, the first 500 shown"
    _head(page, "alpha").click()
    assert page.locator("#module-table tbody th .name").first.inner_text() == "module.599"  # sorted over all rows
    page.get_by_role("button", name="Show all 600").click()
    assert rows.count() == 600
    page.reload()
    page.get_by_role("link", name="module.599").click()
    assert page.locator("tr:target th .name").inner_text() == "module.599"
