"""What the figures show: their curves against the numbers they are of."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import esdtool
from esdtool.analysis.document import Analysis
from esdtool.analysis.module_record import ModuleResult
from esdtool.comparison.trajectory import make_trajectory
from esdtool.errors import OutputError, UsageError
from esdtool.report.figures import KINDS, Material, save_comparison, save_figures, style
from esdtool.report.figures.alphas import alpha_grid
from esdtool.report.figures.collect import chosen_modules
from esdtool.report.figures.decays import Decay, save_decays
from esdtool.report.figures.esd import draw_esd
from esdtool.report.figures.style import new_figure, role_styles


@pytest.fixture(scope="module")
def analysis(bundled: Path) -> Analysis:
    return esdtool.analyze(bundled)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that the test makes."""
    made: list[Figure] = []

    class Recorded(Figure):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(style, "Figure", Recorded)
    return made


def _lines(figure: Figure) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in figure.axes[0].get_lines()}


def test_the_esd_has_its_tail_and_its_null(analysis: Analysis) -> None:
    module = analysis.modules[0]
    figure = Figure()
    draw_esd(figure.subplots(), module, analysis.esds[module.name])
    lines = _lines(figure)
    (tail,) = (line for label, line in lines.items() if label.startswith("hill"))
    x, y = np.log(np.asarray(tail.get_xdata())), np.log(np.asarray(tail.get_ydata()))
    assert np.polyfit(x, y, 1)[0] == pytest.approx(-module.alpha)
    assert np.exp(x[[0, -1]]) == pytest.approx([module.xmin, module.lambda_max])
    assert f"{module.alpha:.3f} ± {module.alpha_stderr:.3f}" in str(tail.get_label())
    null = lines["Marchenko-Pastur, same shape"]
    inside = np.isfinite(np.asarray(null.get_ydata()))
    assert np.asarray(null.get_xdata())[inside].max() == pytest.approx(module.mp_bulk_max, rel=0.1)
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"


def test_the_heat_map_has_the_means(analysis: Analysis) -> None:
    layers, roles, grid = alpha_grid(analysis)
    assert layers == [0, 1, 2, 3, 4]
    assert roles == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for module in analysis.modules:
        assert grid[roles.index(module.role), layers.index(module.layer)] == module.alpha
    doubled = analysis.model_copy(
        update={"modules": (*analysis.modules, analysis.modules[0].model_copy(update={"alpha": 9.0}))}
    )
    assert alpha_grid(doubled)[2][0, 0] == fmean([analysis.modules[0].alpha or 0.0, 9.0])


def test_all_kinds_of_a_checkpoint(analysis: Analysis, tmp_path: Path) -> None:
    files = save_figures([analysis], tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in files]
    assert [name for name in names if "/" not in name] == ["heat-map.png", "depth.png", "roles.png"]
    assert len([name for name in names if name.startswith("esd/")]) == 3
    assert len([name for name in names if name.startswith("ks/")]) == 3
    assert f"esd/{analysis.summary.most_heavy_tailed[0]}.png" in names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_vector_formats_give_the_same_bytes(analysis: Analysis, tmp_path: Path, suffix: str, start: bytes) -> None:
    first, second = (
        save_figures([analysis], tmp_path / name, kinds=["heat-map"], suffix=suffix)[0].read_bytes() for name in "ab"
    )
    assert first == second
    assert first.startswith(start)


def test_several_checkpoints_side_by_side(analysis: Analysis, tmp_path: Path) -> None:
    def renamed(name: str) -> Analysis:
        return analysis.model_copy(update={"source": analysis.source.model_copy(update={"checkpoint": name})})

    steps = [renamed(f"run/step_{step}") for step in (10, 20, 30)]
    files = save_figures(steps, tmp_path / "steps", kinds=["roles", "alpha-steps", "heat-map"])
    assert [path.name for path in files] == [
        "roles.png",
        "alpha-steps.png",
        "heat-map-run-step_10.png",
        "heat-map-run-step_20.png",
        "heat-map-run-step_30.png",
    ]
    same = [renamed("a/model"), renamed("a/model"), renamed("a/model")]
    assert len({path.name for path in save_comparison(same, tmp_path / "same")}) == 3


def test_what_there_is_no_material_for_is_said(analysis: Analysis, tmp_path: Path) -> None:
    bare = Analysis.model_validate_json(analysis.to_json())
    with pytest.raises(UsageError, match="no figure 'esd': it needs the eigenvalues"):
        save_figures([bare], tmp_path, kinds=["esd"])
    assert [path.name for path in save_figures([bare], tmp_path)] == ["heat-map.png", "depth.png", "roles.png"]
    for kind in ("decay", "alpha-steps", "decay-steps", "loss", "perplexity"):
        with pytest.raises(UsageError, match=f"no figure '{kind}'"):
            save_figures([analysis], tmp_path, kinds=[kind])
    with pytest.raises(UsageError, match="nothing to draw"):
        save_figures(Material(), tmp_path)


def test_modules_are_chosen_by_pattern(analysis: Analysis) -> None:
    chosen = chosen_modules(analysis, [r"layers\.1\..*q_proj", "down_proj"])
    assert [module.name for module in chosen][:2] == ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    assert len(chosen) == 6
    alphas = [module.alpha for module in chosen_modules(analysis, [])]
    assert alphas == sorted(alphas)
    assert alphas[0] == min(module.alpha for module in analysis.scored)
    with pytest.raises(UsageError, match="--module nothing: matches no scored module"):
        chosen_modules(analysis, ["nothing"])
    with pytest.raises(UsageError, match="not a regular expression"):
        chosen_modules(analysis, ["("])


@pytest.mark.slow
def test_no_figure_replaces_another(analysis: Analysis, tmp_path: Path) -> None:
    # Names that differ only where they are cut, in what files' names lack, or in case, which some file systems ignore.
    stem = "model." + "deeply." * 30
    names = [f"{stem}{end}" for end in ("q_proj", "k_proj")] + [
        "a/b",
        "a b",
        "a-b",
        "A-B",
        "模" * 100,
        "模" * 99 + "型",
    ]
    modules = [module.model_copy(update={"name": name}) for name, module in zip(names, analysis.modules, strict=False)]
    esds = {name: analysis.esds[module.name] for name, module in zip(names, analysis.modules, strict=False)}
    evil = analysis.model_copy(update={"modules": tuple(modules)}).with_esds(esds)
    files = save_figures(Material(analyses=(evil,), modules=(".",)), tmp_path, kinds=["esd", "ks"])
    assert len({str(path).casefold() for path in files}) == len(files) == 2 * len(names)
    assert all(path.stat().st_size > 0 for path in files)
    assert set(tmp_path.rglob("*.png")) == set(files)
    again = save_figures(Material(analyses=(evil,), modules=(".",)), tmp_path, kinds=["esd", "ks"])
    assert again == files

    def of(name: str) -> Analysis:
        return analysis.model_copy(update={"source": analysis.source.model_copy(update={"checkpoint": name})})

    checkpoints = tuple(of(f"{'run' * 60}/{end}") for end in ("a b", "a-b", "A-B", "a b"))
    files = save_figures(Material(analyses=checkpoints), tmp_path / "more", kinds=["heat-map", "depth"])
    assert len({path.name.casefold() for path in files}) == 8


@pytest.mark.parametrize("scale", [1e-160, 1e-150, 1e-52, 1.0, 1e52, 1e150])
def test_weights_of_any_scale_are_drawn(scale: float, tmp_path: Path) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((56, 64)) * scale)
    analysis = esdtool.analyze({"l.0.q_proj.weight": weight}, cache=False)
    files = save_figures([analysis], tmp_path)
    # Eigenvalues that float64 cannot hold are not kept, and then there is nothing to draw of the module itself.
    assert [path.parent.name for path in files if path.parent != tmp_path] == (["esd", "ks"] if analysis.esds else [])


def test_hostile_names_are_only_text(analysis: Analysis, tmp_path: Path) -> None:
    name = r"../../$\frac{1}$/\u4e2d<script>" + "x" * 300 + "日本"
    module = analysis.modules[0].model_copy(update={"name": name, "role": "$x_$"})
    hostile = analysis.model_copy(update={"modules": (module, *analysis.modules[1:])})
    hostile = hostile.with_esds({**analysis.esds, name: analysis.esds[analysis.modules[0].name]})
    files = save_figures(Material(analyses=(hostile,), modules=(r"\$",)), tmp_path / "out", kinds=["esd", "heat-map"])
    assert all(path.resolve().is_relative_to(tmp_path / "out") for path in files)
    assert len(files) == 2


def test_a_role_looks_the_same_in_every_figure() -> None:
    few, many = role_styles(["up_proj", "q_proj"]), role_styles(["q_proj", "mixer", "k_proj", "pooler", "up_proj"])
    assert all(few[role] == many[role] for role in few)
    assert len({(style["color"], style["marker"], style["linestyle"]) for style in many.values()}) == 5


def test_decays_without_blocks_or_alphas(tmp_path: Path) -> None:
    loose = Decay(role="head", layer=None, weight_decay=0.1, alpha=2.0)
    assert save_decays(tmp_path / "none.png", [loose], base=0.1, title="") is None
    uniform = [Decay(role="q_proj", layer=layer, weight_decay=0.1, alpha=None) for layer in range(3)]
    assert save_decays(tmp_path / "plain.png", uniform, base=0.1, title="a") == tmp_path / "plain.png"


def test_a_failure_leaves_nothing_behind(analysis: Analysis, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="png, svg, pdf"), new_figure(tmp_path / "x.gif", width=1, height=1):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make the folder"):
        save_figures([analysis], tmp_path / "file")
    with pytest.raises(RuntimeError), new_figure(tmp_path / "half.png", width=1, height=1):
        raise RuntimeError
    assert not (tmp_path / "half.png").exists()


@pytest.mark.slow
def test_the_command_knows_its_sources(esdtool_cli, bundled: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("analysis.json", "wd.json", "esd.safetensors", "trajectory.json")}
    esdtool_cli("analyze", bundled, "--json", files["analysis.json"], "--esd", files["esd.safetensors"], "-q")
    esdtool_cli("assign", "--out", files["wd.json"])
    found = Analysis.from_json(files["analysis.json"])
    files["trajectory.json"].write_text(make_trajectory([found, found]).to_json())
    out = tmp_path / "out"
    result = esdtool_cli(
        "plot", *(files[name] for name in ("analysis.json", "wd.json", "trajectory.json")),
        "--esd", files["esd.safetensors"], "--out", out, "--format", "svg",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    names = {path.name for path in out.iterdir()}
    assert names == {"esd", "ks", "heat-map.svg", "depth.svg", "roles.svg", "decay.svg", "alpha-steps.svg"}
    assert result.stderr.count("esdtool: wrote ") == 11
    latest = esdtool_cli("plot", "--kind", "roles", "--out", out, "-q")
    assert (latest.returncode, latest.stdout, latest.stderr) == (0, "", "")


@pytest.mark.slow
def test_the_command_refuses_in_one_line(esdtool_cli, bundled: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "other.json"
    wrong.write_text(json.dumps({"format": "something"}))
    for arguments, code, words in (
        (["--kind", "pie"], 2, f"no such figure; there are {', '.join(KINDS)}"),
        ([bundled, "--esd", "x"], 2, "--esd goes with one analysis"),
        ([tmp_path / "missing"], 1, "missing"),
        ([wrong], 1, "other.json"),
        ([], 1, "no analysis yet"),
        ([bundled, "--module", "nothing"], 2, "matches no scored module"),
    ):
        result = esdtool_cli("plot", *arguments, "--out", tmp_path / "out")
        lines = result.stderr.strip().splitlines()
        assert result.returncode == code, result.stderr
        assert len(lines) == 1
        assert words in lines[0]


def _first_block_repeated(analysis: Analysis, layers: int) -> Analysis:
    first = [module for module in analysis.modules if module.layer == 0]
    modules = [
        module.model_copy(update={"name": module.name.replace(".0.", f".{layer}."), "layer": layer})
        for layer in range(layers)
        for module in first
    ]
    return analysis.model_copy(update={"modules": tuple(modules)})


def test_the_heat_map_is_coloured_by_distance_and_its_labels_are_apart(
    analysis: Analysis, tmp_path: Path, drawn: list[Figure]
) -> None:
    for layers in (5, 100, 150):
        repeated = _first_block_repeated(analysis, layers)
        save_figures([repeated], tmp_path / str(layers), kinds=["heat-map"])
        figure = drawn[-1]
        axes, bar = figure.axes
        assert bar.get_ylabel() == "distance from random (%)"
        shades = axes.images[0].get_array()
        assert float(shades[0, 0]) == pytest.approx(100 * (repeated.modules[0].null_distance or 0))
        assert len(axes.texts) == (35 if layers == 5 else 0)
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
        assert figure.get_figwidth() <= 11
    save_figures([analysis.model_copy(update={"modules": _undistanced(analysis)})], tmp_path / "n", kinds=["heat-map"])
    assert drawn[-1].axes[1].get_ylabel().startswith("α")


def _undistanced(analysis: Analysis) -> tuple[ModuleResult, ...]:
    return tuple(module.model_copy(update={"null_distance": None}) for module in analysis.modules)


def test_titles_of_any_length_stay_in_the_figure_and_are_readable(
    analysis: Analysis, tmp_path: Path, drawn: list[Figure]
) -> None:
    for count in (1, 5, 30):
        source = analysis.source.model_copy(update={"checkpoint": "-".join(["model_name"] * count)})
        save_figures([analysis.model_copy(update={"source": source})], tmp_path / str(count), kinds=["roles", "depth"])
        for figure in drawn[-2:]:
            title = figure.axes[0]._left_title  # type: ignore[attr-defined]
            assert title.get_fontsize() >= 7
            renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
            assert title.get_window_extent(renderer).x1 <= figure.bbox.x1
            assert title.get_text().endswith("name")
