"""Sparklines and the heat map: what they show, on which terminals, and in how many columns."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

import esdtool
from esdtool.comparison.trajectory import make_trajectory
from esdtool.report.tables.analysis import module_columns
from esdtool.report.terminal.analysis import print_analysis, print_trajectory
from esdtool.report.terminal.heatmap import SHADES, alpha_heat_map
from esdtool.report.terminal.sparkline import (
    ASCII,
    BLOCKS,
    esd_sparkline,
    esds_of_rows,
    ramp_for,
    shortened,
    sparkline,
)

Tensors = dict[str, torch.Tensor]


def _printed(draw: Callable[[Console], object], width: int = 80, **options: object) -> str:
    stream = io.StringIO()
    draw(Console(file=stream, width=width, highlight=False, **options))  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.fixture
def deep(make_llama: Callable[..., Tensors]) -> esdtool.Analysis:
    """32 layers of 7 roles."""
    return esdtool.analyze(make_llama(layers=32))


def test_heights_follow_the_values() -> None:
    line = sparkline([0, 1, 2, 3, 4, 5, 6, 7])
    assert line == BLOCKS
    assert sparkline([7, 0], ramp=ASCII) == "#_"
    assert sparkline([None, None]) == "  "
    assert sparkline([0, 0], zero=0) == "  "


def test_many_values_are_averaged_to_fit() -> None:
    values = list(range(100))
    short = shortened(values, 10)
    assert short == [float(np.mean(values[start : start + 10])) for start in range(0, 100, 10)]
    assert shortened([1.0, None], 5) == [1.0, None]


def test_an_esd_has_its_peak_and_the_tail_is_marked() -> None:
    # 1000 eigenvalues within a bin near 1, then one a decade up to 1e4.
    eigenvalues = np.concatenate([np.full(1000, 1.0), [10.0, 100.0, 1e3, 1e4]])
    plain = esd_sparkline(eigenvalues, None).plain
    assert len(plain) == 18
    assert plain[0] == "█"
    assert plain.count("▁") == 4
    marked = esd_sparkline(eigenvalues, 100.0).plain
    assert marked.replace("|", "") == plain
    # xmin = 100 is half-way up the logarithmic axis, and its block stands behind the mark.
    assert marked.index("|") == 9
    assert marked[10] == "▁"
    assert esd_sparkline(eigenvalues, 1.0).plain[0] == "|"
    assert esd_sparkline([0.0, 0.0], 1.0).plain == ""


def test_averaged_experts_show_all_their_eigenvalues() -> None:
    from esdtool.report.tables.experts import fold_experts

    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in range(3)]
    analysis = esdtool.analyze({name: torch.randn(80, 60, generator=generator) for name in names})
    ((values, xmin),) = esds_of_rows(analysis, fold_experts(analysis.modules)).values()
    assert np.array_equal(np.sort(values), np.sort(np.concatenate(list(analysis.esds.values()))))
    assert xmin is None


def test_rows_fit_80_columns_with_whole_names(deep: esdtool.Analysis) -> None:
    shown = _printed(lambda console: print_analysis(deep, sparklines=True, top=40, console=console))
    assert max(map(cell_len, shown.splitlines())) <= 80
    line = next(line for line in shown.splitlines() if "model.layers.3.self_attn.q_proj" in line)
    module = next(module for module in deep.modules if module.name == "model.layers.3.self_attn.q_proj")
    assert esd_sparkline(deep.esds[module.name], module.xmin).plain in line
    assert f"{module.alpha:.3f}" in line


def test_32_layers_of_7_roles_fit_80_columns(deep: esdtool.Analysis) -> None:
    shown = _printed(lambda console: [console.print(part) for part in alpha_heat_map(deep, console)])
    lines = shown.splitlines()
    assert max(map(cell_len, lines)) <= 80
    (last,) = (line.split() for line in lines if line.split()[:1] == ["31"])
    alphas = [module.alpha for module in deep.modules if module.layer == 31]
    assert [float(cell[1:]) for cell in last[1:]] == pytest.approx(alphas, abs=6e-3)
    assert {cell[0] for cell in last[1:7]} == {SHADES[0]}
    (first,) = (line.split() for line in lines if line.split()[:1] == ["0"])
    assert first[-1][0] == SHADES[-1]


def test_many_roles_stand_down_or_come_in_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    roles = [f"{block}.{role}" for block in ("self_attn", "cross_attn") for role in ("q_proj", "k_proj", "v_proj")]
    roles += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]

    def model(layers: int) -> esdtool.Analysis:
        names = [f"layers.{layer}.{role}.weight" for layer in range(layers) for role in roles]
        return esdtool.analyze({name: torch.randn(60, 60, generator=generator) for name in names})

    for layers, parts, corner in ((2, 1, "role"), (14, 2, "layer")):
        analysis = model(layers)
        shown = _printed(lambda console: [console.print(part) for part in alpha_heat_map(analysis, console)])  # noqa: B023
        assert shown.count("alpha by layer and role") == parts
        assert shown.count(corner + " ") >= parts
        assert max(map(cell_len, shown.splitlines())) <= 80
        assert sum(line.count(".") for line in shown.splitlines() if any(s in line for s in SHADES)) >= 9 * layers


def test_colours_only_where_they_show(deep: esdtool.Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    def heat(**options: object) -> str:
        return _printed(lambda console: [console.print(part) for part in alpha_heat_map(deep, console)], **options)

    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = heat(force_terminal=True, color_system="truecolor")
    assert "48;2;" in coloured  # a background
    assert not set(SHADES) & set(coloured)
    for options in (
        {},
        {"force_terminal": True, "color_system": "standard"},
        {"force_terminal": True, "color_system": "truecolor", "no_color": True},
    ):
        plain = heat(**options)
        assert "48;" not in plain
        assert set(SHADES) & set(plain)


def test_a_trajectory_shows_the_course_of_each_role(make_llama: Callable[..., Tensors]) -> None:
    trajectory = make_trajectory([esdtool.analyze(make_llama(layers=1, seed=seed)) for seed in range(3)])
    shown = _printed(lambda console: print_trajectory(trajectory, sparklines=True, console=console), width=120)
    alphas = [step.alpha_by_role["q_proj"] for step in trajectory.steps]
    rows = [line for line in shown.split("each role on its own scale")[1].splitlines() if " q_proj" in line]
    assert sparkline(alphas) in rows[0]
    assert f"{alphas[-1] - alphas[0]:+.3f}" in rows[0]


def test_an_analysis_without_eigenvalues_says_so(deep: esdtool.Analysis, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(deep.to_json())
    read = esdtool.Analysis.from_json(tmp_path / "a.json")
    shown = _printed(lambda console: print_analysis(read, sparklines=True, console=console))
    assert "carries no eigenvalues" in shown
    assert "ESD, | tail" not in shown
    assert "alpha by layer and role" in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_no_encoding_crashes(esdtool_cli, llama_dir: Path, encoding: str) -> None:
    result = esdtool_cli("analyze", llama_dir, "--sparklines", env={**os.environ, "PYTHONIOENCODING": encoding})
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()
    assert any(set(line) & set("#*") and "|" in line for line in result.stdout.splitlines() if "q_proj" in line)


def test_the_ramp_is_of_one_kind() -> None:
    assert ramp_for("utf-8") == BLOCKS
    assert ramp_for("cp437") == ASCII  # it has some of the blocks only


@pytest.mark.parametrize("width", [60, 80, 99, 100, 127, 128, 200])
@pytest.mark.parametrize("sparklines", [False, True])
def test_a_narrow_table_says_what_it_leaves_out(width: int, sparklines: bool, bundled: Path) -> None:
    analysis = esdtool.analyze(bundled)
    shown = _printed(
        lambda console: print_analysis(analysis, top=2, sparklines=sparklines, console=console), width=width
    )
    said = " ".join(shown.split("alpha by role")[0].split()).partition("Left out at ")[2]
    heading = next(line for line in shown.splitlines() if line.startswith(" module ")) + " "
    columns = [column.heading for column in module_columns(analysis, narrow=False)]
    missing = [name for name in columns if f" {name} " not in heading]
    if missing:
        assert said.startswith(f"{width} columns: {', '.join(missing)}. A wider terminal and --csv have them.")
    else:
        assert said == ""
