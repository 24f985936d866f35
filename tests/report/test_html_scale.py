"""Reports of a model of 150 layers and 1,050 modules in a browser: wide and narrow, light and dark."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esdtool.analysis.document import Analysis
from esdtool.analysis.summary import summarize
from esdtool.comparison.checkpoints import compare_analyses
from esdtool.report.html import analysis_page, comparison_page
from esdtool.report.html.curves import Curve, line_chart
from esdtool.report.html.page import page as whole_page
from tests.report.conftest import Opened

LAYERS = 150
STACK = "model.language_model.transformer_stack.layers"


def _large(analysis: Analysis, *, drift: float = 0.0) -> Analysis:
    """The bundled checkpoint's first block, 150 times."""
    draw = random.Random(0)
    first = [module for module in analysis.modules if module.layer == 0]
    modules = [
        module.model_copy(
            update={
                "name": module.name.replace("model.layers.0", f"{STACK}.{layer}"),
                "parameter": module.parameter.replace("model.layers.0", f"{STACK}.{layer}"),
                "layer": layer,
                "alpha": (module.alpha or 2.0) + drift + draw.gauss(0, 0.1),
                "null_distance": draw.random(),
            }
        )
        for layer in range(LAYERS)
        for module in first
    ]
    summary = summarize(modules, num_skipped=len(analysis.skipped))
    return analysis.model_copy(update={"modules": tuple(modules), "summary": summary})


@pytest.fixture(scope="module")
def pages(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The analysis, a comparison of it, and curves that lie on one another."""
    one, other = _large(analysis), _large(analysis, drift=-0.3)
    other = other.model_copy(update={"source": other.source.model_copy(update={"checkpoint": "a/later_one"})})
    same = tuple((float(step), 30 - step / 10) for step in range(0, 150, 10))
    curves = [Curve(label=f"run_{name}", points=same) for name in "ab"]
    chart = line_chart(curves, heading="Loss", across="step", up="loss")
    texts = {
        "analysis": analysis_page(one),
        "comparison": comparison_page(compare_analyses([one, other])),
        "curves": whole_page("Curves", chart, None),
    }
    folder = tmp_path_factory.mktemp("large")
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture(
    scope="module",
    params=[
        (1400, "dark"),
        (400, "light"),
        pytest.param((1400, "light"), marks=pytest.mark.slow),
        pytest.param((400, "dark"), marks=pytest.mark.slow),
    ],
    ids=lambda combination: f"{combination[0]}-{combination[1]}",
)
def shown(request: pytest.FixtureRequest, browser: Any, pages: dict[str, Path]) -> Iterator[dict[str, Opened]]:
    """Each page, loaded once for a width and a colour scheme."""
    width, scheme = request.param
    view = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    found = {name: Opened(browser, path, **view) for name, path in pages.items()}
    yield found
    for each in found.values():
        each.check()
        each.page.close()


def _box(page: Any, selector: str) -> dict[str, float]:
    box = page.locator(selector).first.bounding_box()
    assert box is not None
    return box


def test_pages_fit_and_the_table_is_near(shown: dict[str, Opened]) -> None:
    for name in ("analysis", "comparison"):
        page = shown[name].page
        width = page.viewport_size["width"]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for part in ("map", "roles", "depth") if name == "analysis" else ("map", "roles"):
            assert _box(page, f"section:has(#{part})")["height"] < 700
        # The map uses the width, and not more than a few lines of the height.
        heat = _box(page, ".scroll:has(.heat)")
        assert heat["height"] < 400
        assert heat["width"] > 0.9 * (width - 80)
        columns = page.locator(".heat tbody tr").first.locator("td").count()
        assert columns == LAYERS


def test_alpha_is_in_sight_and_names_keep_both_ends(shown: dict[str, Opened]) -> None:
    page = shown["analysis"].page
    width = page.viewport_size["width"]
    alpha = _box(page, "#module-table td.alpha")
    assert alpha["x"] + alpha["width"] <= width
    name = page.locator("#module-table tbody th .name").first
    assert name.inner_text() == f"{STACK}.0.self_attn.q_proj"
    head, tail = (name.locator(part) for part in (".head", ".tail"))
    assert head.evaluate("part => part.scrollWidth > part.clientWidth")  # its end is what is left out
    assert head.bounding_box()["width"] > 25
    assert tail.evaluate("part => part.scrollWidth <= Math.ceil(part.getBoundingClientRect().width)")
    assert _box(page, "#module-table tbody th .tail")["x"] + tail.bounding_box()["width"] <= alpha["x"]
    assert page.locator("#module-table tbody th .name").first.get_attribute("title") == name.inner_text()


def test_the_depth_chart_names_axes_and_roles(shown: dict[str, Opened]) -> None:
    page = shown["analysis"].page
    texts = page.locator("svg.depth text").all_text_contents()
    assert {"alpha", "layer"} <= set(texts)
    layers = [int(text) for text in texts if text.isdecimal()]
    assert layers == list(range(0, LAYERS, layers[1]))  # round and evenly spaced
    assert layers[1] % 5 == 0
    roles = page.locator("section:has(svg.depth) .keys li").all_inner_texts()
    assert roles[:2] == ["q_proj", "k_proj"]
    assert len(roles) == 8


def test_underlines_keep_clear_of_underscores(shown: dict[str, Opened]) -> None:
    """An underscore of a monospaced font lies up to a quarter of an em beneath the baseline."""
    page = shown["analysis"].page
    links = "[...document.querySelectorAll('header a, .sort')]"
    style = "getComputedStyle(link).textUnderlineOffset"
    offsets = page.evaluate(f"{links}.map(link => [{style}, getComputedStyle(link).fontSize])")
    for offset, size in offsets:
        assert float(offset.removesuffix("px")) >= 0.3 * float(size.removesuffix("px"))


def test_curves_tell_their_values_and_are_brought_out(shown: dict[str, Opened]) -> None:
    page = shown["curves"].page
    lines = page.locator("svg.lines .line")
    dashes = lines.evaluate_all("lines => lines.map(line => getComputedStyle(line).strokeDasharray)")
    assert dashes[0] == "none" != dashes[1]  # the second lies on the first
    drawing = page.locator("svg.lines")
    box = drawing.bounding_box()
    drawing.hover(position={"x": 0.12 * box["width"], "y": 0.5 * box["height"]})
    assert page.locator(".keys .at").inner_text() == "step 0"
    assert page.locator(".keys .value").all_inner_texts() == ["30.00", "30.00"]
    page.get_by_role("button", name=re.compile("run_b")).click()
    opacity = "curves => curves.map(curve => getComputedStyle(curve).opacity)"
    assert page.locator("svg.lines .curve").evaluate_all(opacity) == ["0.12", "1"]
    page.locator(".scroll:has(svg.lines)").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".keys .value").first.inner_text() == "30.00"
    page.keyboard.press("ArrowRight")
    assert page.locator(".keys .value").first.inner_text() == "29.00"


def test_colours_follow_the_scheme(shown: dict[str, Opened]) -> None:
    for name, mark in (("analysis", "svg.depth .k6"), ("curves", "svg.lines .line")):
        page = shown[name].page
        dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        background, stroke, words = page.evaluate(
            f"[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('{mark}'))"
            ".stroke, getComputedStyle(document.querySelector('svg text')).fill]"
        )
        levels = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (background, stroke, words)]
        assert (levels[0] < 200) == dark
        assert min(abs(levels[0] - level) for level in levels[1:]) > 200
