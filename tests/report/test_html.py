"""The HTML report as a document: what it says, what it lets through, and how large it gets."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import numpy as np
import pytest

from esdtool.analysis.document import Analysis
from esdtool.analysis.run import analyze
from esdtool.analysis.verdict import closing_words, verdict_words
from esdtool.report.html import analysis_page
from esdtool.report.html.colours import contrast, diverging, ink, scale_colours, sequential
from esdtool.report.html.markup import tag
from esdtool.report.html.page import embedded_json, page
from esdtool.report.tables.density import esd_histogram
from esdtool.spectra.marchenko_pastur import mp_density
from esdtool.support.words import visible
from tests.conftest import llama_tensors
from tests.report.conftest import HOSTILE
from tests.report.html_reader import Element, data_of, read_page, table_rows


@pytest.fixture(scope="module")
def document(analysis: Analysis) -> Element:
    return read_page(analysis_page(analysis))


def test_opens_with_the_conclusion_and_links_to_the_rows_it_names(analysis: Analysis, document: Element) -> None:
    header = document.one("header")
    words = re.sub(r"\s+", " ", " ".join(part.text for part in header.all("p")))
    # The words of the terminal, sentence ends aside.
    assert words.replace(".", "") == closing_words(analysis).replace(".", "")
    links = {link.text: link.attributes["href"] for link in header.all("a")}
    assert set(links) == {*analysis.summary.most_heavy_tailed, *analysis.summary.least_heavy_tailed}
    for name, target in links.items():
        row = document.one("tr", id=str(target).removeprefix("#"))
        assert row.one("th").text == name


def test_the_module_table_has_a_row_for_each_module(analysis: Analysis, document: Element) -> None:
    rows = table_rows(document, "module-table")
    assert len(rows) == len(analysis.modules)
    for row, module in zip(rows, analysis.modules, strict=True):
        assert module.alpha is not None
        assert row[0] == module.name
        assert row[1] == f"{module.alpha:.3f}"
        assert row[3] == f"{module.alphas['ks']:.3f}"
        assert row[-1] == verdict_words(module, "hill")
    values = [float(cell.attributes["data-v"]) for cell in document.all("td", class_="n alpha")]
    assert values == pytest.approx([module.alpha for module in analysis.modules], rel=1e-5)


def test_the_heat_map_holds_the_mean_of_each_cell(analysis: Analysis, document: Element) -> None:
    table = document.one("table", class_="heat")
    layers = [int(head.text) for head in table.one("thead").all("th")[1:]]
    for row in table.one("tbody").all("tr"):
        role = row.one("th").text
        for layer, cell in zip(layers, row.all("td"), strict=True):
            (alpha,) = [m.alpha for m in analysis.modules if (m.layer, m.role) == (layer, role)]
            assert cell.text == f"{alpha:.2f}"


def test_every_skipped_tensor_is_counted(analysis: Analysis, document: Element) -> None:
    part = document.all("section")[-1]
    counts = [int(row.all("td")[0].text) for row in part.one("tbody").all("tr")]
    assert sum(counts) == len(analysis.skipped) > 0
    assert {tensor.reason for tensor in analysis.skipped} == {row.all("td")[1].text for row in part.all("tr")[1:]}


def test_the_drawn_numbers_are_those_of_the_spectrum(analysis: Analysis, document: Element) -> None:
    data = data_of(document)
    for module, entry in zip(analysis.modules, data["rows"], strict=True):
        _, fits, _, (low, high, total, counts), drawn, (shape, scale) = entry
        histogram = esd_histogram(analysis.esds[module.name])
        assert counts == histogram.counts.tolist()
        assert total == histogram.total
        edges = np.geomspace(low, high, len(counts) + 1)
        np.testing.assert_allclose(edges, histogram.edges, rtol=1e-4)
        assert data["estimators"][drawn] == "hill"
        assert fits[drawn][0] == pytest.approx(module.alpha, rel=1e-5)
        low, high, densities = data["nulls"][shape]
        k = len(densities)
        grid = np.exp(np.log(low * high) / 2 - np.log(high / low) / 2 * np.cos(np.pi * np.arange(k) / (k - 1)))
        sigma = module.measure("mp_sigma")  # of the bulk: tests/spectra/test_measures.py
        expected = mp_density(grid * scale, *module.shape, mean_square=sigma**2)
        np.testing.assert_allclose(np.array(densities[1:-1]) / scale, expected[1:-1], rtol=2e-3)


def test_nothing_but_the_own_style_and_script_is_admitted(document: Element) -> None:
    policy = str(document.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"])
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    script = next(part for part in document.all("script") if "type" not in part.attributes)
    for kind, part in (("script-src", script), ("style-src", document.one("style"))):
        digest = base64.b64encode(hashlib.sha256(part.text.encode()).digest()).decode()
        assert directives[kind] == f"'sha256-{digest}'"


def _elements(element: Element) -> list[Element]:
    return [e for child in element.children if isinstance(child, Element) for e in (child, *_elements(child))]


def test_names_of_a_checkpoint_stay_text(hostile: Analysis, document: Element) -> None:
    text = analysis_page(hostile)
    found = read_page(text)
    names = [row[0] for row in table_rows(found, "module-table")]
    for name in HOSTILE:
        shown = visible(name.removesuffix(".weight"))
        assert shown in names or len(shown) > 240
    assert max(map(len, names)) < 300
    # No kind of element or attribute that the report of a tame checkpoint has not.
    elements, tame = _elements(found), _elements(document)
    assert {element.tag for element in elements} <= {element.tag for element in tame}
    attributes = {key for element in elements for key in element.attributes}
    assert attributes - {key for element in tame for key in element.attributes} <= {"title"}  # of cells without module
    assert "\u202e" not in text


def test_text_that_utf8_cannot_hold_is_spelled_out(analysis: Analysis) -> None:
    module = analysis.modules[0].model_copy(update={"name": "a.\ud800\x00.b"})
    text = analysis_page(analysis.model_copy(update={"modules": (module, *analysis.modules[1:])}))
    assert "a.<wbr>\\ud800\\x00.<wbr>b" in text
    text.encode("utf-8")


def test_embedded_json_cannot_leave_its_element() -> None:
    data = ["</script><!--", "a & b", "\u2028\u2029"]
    text = embedded_json(data)
    assert not re.search(r"[<>&\u2028\u2029]", text)
    assert json.loads(text) == data
    found = read_page(page("</title><b>", [tag("p", "<i>")], data))
    assert found.one("title").text == "</title><b>"
    assert data_of(found) == data


def test_without_eigenvalues_the_page_says_why_it_has_no_figures(analysis: Analysis) -> None:
    found = read_page(analysis_page(analysis.with_esds({})))
    assert "read from a file" in found.one("main").text
    assert all(entry[3] is None for entry in data_of(found)["rows"])
    assert len(table_rows(found, "module-table")) == len(analysis.modules)


def test_a_difference_names_its_base(analysis: Analysis) -> None:
    source = analysis.source.model_copy(update={"checkpoint": "tuned", "base": "org/base"})
    found = read_page(analysis_page(analysis.model_copy(update={"source": source})))
    assert found.one("h1").text.endswith("tuned minus org/base")
    assert [dd.text for dd in found.one("header").all("dd")][:2] == ["tuned", "org/base"]


def test_modules_without_alpha_are_listed_with_the_reason() -> None:
    tensors = llama_tensors(1)
    found = analyze(tensors, min_eigs=100)
    document = read_page(analysis_page(found))
    assert document.one("p", class_="lead").text == "No module could be scored."
    rows = table_rows(document, "module-table")
    assert [row[-1] for row in rows] == [module.status for module in found.modules]
    assert document.all("table", class_="heat") == []


def test_experts_share_a_row_unless_all_are_asked_for(moe: Analysis) -> None:
    folded = read_page(analysis_page(moe))
    rows = table_rows(folded, "module-table")
    names = [row[0] for row in rows]
    assert "model.layers.0.mlp.experts.*.up_proj (3)" in names
    entry = data_of(folded)["rows"][names.index("model.layers.0.mlp.experts.*.up_proj (3)")]
    assert "--experts all" in entry
    heat = folded.one("table", class_="heat")
    (row,) = [row for row in heat.one("tbody").all("tr") if row.one("th").text == "up_proj"]
    alphas = [module.alpha for module in moe.modules if module.role == "up_proj" and module.alpha is not None]
    assert len(alphas) == 3
    assert row.all("td")[0].text == f"{np.mean(alphas):.2f}"
    every = read_page(analysis_page(moe, experts="all"))
    assert [row[0] for row in table_rows(every, "module-table")] == [module.name for module in moe.modules]
    assert all(entry[3] for entry in data_of(every)["rows"])
    # The conclusion names single experts; in the folded table they lead to the row that stands for them.
    for link in folded.one("header").all("a"):
        row = folded.one("tr", id=str(link.attributes["href"])[1:])
        assert re.sub(r"experts\.\d", "experts.*", link.text) in row.one("th").text


@pytest.fixture(scope="module")
def moe() -> Analysis:
    tensors = llama_tensors(1)
    experts = {
        f"model.layers.0.mlp.experts.{expert}.{role}.weight": tensors[f"model.layers.0.mlp.{role}.weight"]
        * (1 + expert)
        for expert in range(3)
        for role in ("gate_proj", "up_proj", "down_proj")
    }
    return analyze(experts | {name: tensor for name, tensor in tensors.items() if "self_attn" in name})


@pytest.mark.parametrize("name", ["s", "d"])
def test_numbers_are_readable_on_every_colour(name: str) -> None:
    colours = scale_colours(name)  # type: ignore[arg-type]
    assert min(contrast(ink(colour), colour) for colour in colours) >= 4.5


def test_both_schemes_have_enough_contrast(document: Element) -> None:
    style = document.one("style").text
    schemes = re.findall(r"--page:[^}]*", style)
    assert len(schemes) == 3
    for scheme in schemes:
        colours = {key: _rgb(value) for key, value in re.findall(r"--([a-z]+): #([0-9a-f]+)", scheme)}
        for ground in ("page", "raised", "mark"):
            for text in ("ink", "good", "bad", "soft", "link"):
                if ground != "mark" or text != "soft":
                    assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for ground in ("page", "raised"):
            for line in ("tail", "mp", "xmin", "control"):
                assert contrast(colours[line], colours[ground]) >= 3, (line, ground)


def _rgb(value: str) -> tuple[int, int, int]:
    value = value if len(value) == 6 else "".join(2 * digit for digit in value)
    red, green, blue = bytes.fromhex(value)
    return red, green, blue


def test_a_far_value_does_not_stretch_the_scale() -> None:
    scale = sequential([2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7, 41.0])
    assert (scale.low, scale.high, scale.clipped_low, scale.clipped_high) == (2.0, 2.7, False, True)
    assert scale.css_class(41.0) == scale.css_class(2.7) != scale.css_class(2.0)
    around_zero = diverging([-0.5, 0.0, 0.25])
    assert (around_zero.low, around_zero.high) == (-0.5, 0.5)
    assert around_zero.css_class(0.0) == "d20"


def test_a_large_model_stays_small(analysis: Analysis) -> None:
    """224 modules of 4096 eigenvalues each."""
    rng = np.random.default_rng(0)
    template = analysis.modules[0]
    modules, esds = [], {}
    summary = analysis.summary.model_copy(update={"most_heavy_tailed": (), "least_heavy_tailed": ()})
    for index in range(224):
        name = f"model.layers.{index // 7}.self_attn.projection_{index % 7}"
        modules.append(template.model_copy(update={"name": name, "layer": index // 7, "shape": (4096, 4096)}))
        esds[name] = np.sort(rng.pareto(1.5, 4096) + 1e-3)
    large = analysis.model_copy(update={"modules": tuple(modules), "summary": summary}).with_esds(esds)
    text = analysis_page(large)
    assert len(text.encode()) < 400_000
    assert len(data_of(read_page(text))["rows"]) == 224
