"""Markdown that a parser reads back: tables keep their cells, and hostile names stay text."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token

import esdtool
from esdtool.checkpoint import from_state_dict
from esdtool.comparison.checkpoints import compare_analyses
from esdtool.comparison.trajectory import make_trajectory
from esdtool.report.markdown import analysis_markdown, code, comparison_markdown, text, trajectory_markdown

Tensors = dict[str, torch.Tensor]

HOSTILE = (
    "model.layers.0.mlp.a|b_proj",
    "x`y`|z",
    "<img src=x onerror=alert(1)>",
    "@octocat",
    "*a* __b__ [c](http://d.example) #1",
    "back\\|slash",
    "&lt;b&gt;",
    " spaced ",
    "line\nbreak",
)


def _parse(markdown: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(markdown)


def _text(inline: Token) -> str:
    """What a reader sees of a cell, `<code>` aside."""
    assert inline.children is not None
    return "".join(
        child.content for child in inline.children if child.content not in ("<code>", "</code>", "&#8203;")
    ).replace("\u200b", "")


def _tables(markdown: str) -> list[list[list[str]]]:
    tables: list[list[list[str]]] = []
    tokens = _parse(markdown)
    for index, token in enumerate(tokens):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("th_open", "td_open"):
            tables[-1][-1].append(_text(tokens[index + 1]))
    return tables


def _only_ours(markdown: str) -> None:
    """Assert that all HTML, and all links, are the report's own."""
    allowed = re.compile(r"</?code>|<details>|</details>|<summary>[^<>]*</summary>|\s")
    for token in _parse(markdown):
        if token.type == "html_block":
            assert not allowed.sub("", token.content), token.content
        for child in token.children or ():
            assert child.type not in ("link_open", "image", "em_open")
            if child.type == "html_inline":
                assert child.content in ("<code>", "</code>"), child.content


@pytest.fixture
def analysis(make_llama: Callable[..., Tensors]) -> esdtool.Analysis:
    return esdtool.analyze(make_llama(layers=2))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_survives_as_text_in_a_cell(name: str) -> None:
    for cell in (code(name), text(name)):
        markdown = f"| a | b |\n| :--- | ---: |\n| {cell} | 1 |"
        ((_, row),) = _tables(markdown)
        shown = name.replace("\n", "\\n")
        assert row == [shown if cell == code(name) else shown.strip(), "1"]
        _only_ours(markdown)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_no_html_in_a_summary(name: str) -> None:
    shown = text(name)
    assert not re.search(r"[<>\n]", shown)
    assert html.unescape(shown).replace("\u200b", "") == name.replace("\n", "\\n")


def test_mentions_and_references_are_broken() -> None:
    for words in ("ask @octocat", "see #12", "http://d.example", "www.d.example"):
        rendered = html.unescape(text(words))
        assert not re.search(r"@\w|#\d|://|www\.\w", rendered), rendered


def test_an_analysis_comes_back(analysis: esdtool.Analysis) -> None:
    markdown = analysis_markdown(analysis, sort="alpha", top=5)
    _only_ours(markdown)
    roles, means, role_means, modules, skipped = _tables(markdown)
    assert [row[0] for row in roles[1:]] == [row.role for row in analysis.summary.by_role]
    assert [row[0] for row in role_means] == ["role", *(row[0] for row in roles[1:])]
    assert {row[0]: float(row[1]) for row in means[1:]}["alpha"] == pytest.approx(analysis.summary.mean_alpha, abs=6e-4)
    alphas = sorted(module.alpha for module in analysis.modules)
    assert [float(row[4]) for row in modules[1:]] == pytest.approx(alphas[:5], abs=6e-4)
    assert sum(int(row[0]) for row in skipped[1:]) == len(analysis.skipped)
    assert {len(row) for row in modules} == {11}
    assert markdown.startswith("Mean alpha ")
    assert markdown.splitlines()[-1].startswith(f"esdtool {esdtool.__version__}; alpha by hill, k-fraction 0.5")
    assert "5 of 14 modules" in markdown


def test_long_tables_wait_behind_a_click(make_llama: Callable[..., Tensors], analysis: esdtool.Analysis) -> None:
    assert "<details>" not in analysis_markdown(analysis)
    long = analysis_markdown(esdtool.analyze(make_llama(layers=3)))
    assert long.count("<details>") == long.count("</details>") == 1
    assert [len(table) for table in _tables(long)] == [8, 8, 8, 22, 4]  # a blank line lets the table within be one


def test_a_hostile_checkpoint_is_but_text() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(64, 60, generator=generator) for name in HOSTILE}
    first = esdtool.analyze(from_state_dict(tensors, location="evil|<b>@octocat"))
    for markdown in (
        analysis_markdown(first),
        trajectory_markdown(make_trajectory([first, first])),
        comparison_markdown(compare_analyses([first, first])),
    ):
        _only_ours(markdown)
        for table in _tables(markdown):
            assert len({len(row) for row in table}) == 1
        assert "<b>" not in re.sub(r"`[^`]*`", "", markdown)
    shown = {row[0] for row in _tables(analysis_markdown(first))[3][1:]}
    assert shown == {name.replace("\n", "\\n") for name in HOSTILE}


def test_a_trajectory_comes_back(analysis: esdtool.Analysis, make_llama: Callable[..., Tensors]) -> None:
    other = esdtool.analyze(make_llama(layers=2, seed=1))
    ((heading, *rows),) = _tables(trajectory_markdown(make_trajectory([analysis, other])))
    assert heading[:3] == ["checkpoint", "mean", "q_proj"]
    assert [float(row[1]) for row in rows] == pytest.approx(
        [analysis.summary.mean_alpha, other.summary.mean_alpha], abs=6e-4
    )


def test_it_prints_on_the_command_line(esdtool_cli, llama_dir: Path) -> None:
    result = esdtool_cli("analyze", llama_dir, "--format", "markdown", "--top", 2)
    assert (result.returncode, result.stderr) == (0, "")
    assert [len(table) for table in _tables(result.stdout)] == [8, 8, 8, 3, 4]
