"""Attention heads and singular vectors in the terminal: what fits, and where the rest is."""

from __future__ import annotations

import io
import re
from pathlib import Path
from statistics import median

import pytest
from rich.console import Console

import esdtool
from esdtool.comparison.trajectory import make_trajectory
from esdtool.report.markdown import trajectory_markdown
from esdtool.report.tables.analysis import module_columns
from esdtool.report.terminal.analysis import print_trajectory
from esdtool.report.terminal.heads import print_heads


@pytest.fixture(scope="module")
def analysis(bundled: Path) -> esdtool.Analysis:
    return esdtool.analyze(bundled, include=[r"layers\.1\.self_attn"], per_head=True)


def console_of(width: int) -> tuple[io.StringIO, Console]:
    printed = io.StringIO()
    return printed, Console(file=printed, width=width)


@pytest.mark.parametrize("width", [80, 133, 134, 200])
def test_names_are_whole_and_numbers_on_one_line_at_any_width(analysis: esdtool.Analysis, width: int) -> None:
    printed, console = console_of(width)
    print_heads(analysis, console)
    (row,) = (line for line in printed.getvalue().splitlines() if "model.layers.1.self_attn" in line)
    cells = re.findall(r"\d\.\d\d", row)
    middle = f"{median(head.alpha for head in analysis.heads if head.role == 'qk'):.2f}"
    assert (len(cells), middle in cells) == (6 if width < 134 else 18, True)
    assert ("in a wider terminal" in printed.getvalue()) == (width < 134)


def test_a_trajectory_says_where_heads_are(analysis: esdtool.Analysis) -> None:
    trajectory = make_trajectory([analysis, analysis])
    printed, console = console_of(200)
    print_trajectory(trajectory, console=console)
    for shown in (printed.getvalue(), trajectory_markdown(trajectory)):
        assert "Attention heads: each checkpoint's are in --json and --csv" in shown
        assert "ingular vectors:" not in shown
    assert {row.split(",")[-4] for row in trajectory.to_csv().splitlines()} >= {"attention", "model.layers.1.self_attn"}


def test_lambda_stands_beside_its_alpha(analysis: esdtool.Analysis) -> None:
    for fit in (("tpl",), ("hill", "tpl"), ("tpl", "ks"), ("hill", "tpl", "ks")):
        settings = analysis.settings.model_copy(update={"fit": fit})
        headings = [
            column.heading
            for column in module_columns(analysis.model_copy(update={"settings": settings}), narrow=False)
        ]
        assert headings[headings.index("Lambda") - 1] == ("+-" if fit[0] == "tpl" else "tpl")
