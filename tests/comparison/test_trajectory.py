"""Several checkpoints of one run, and the table of a mixture of experts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import save_file

import esdtool
from esdtool.comparison.trajectory import in_order_of_training, make_trajectory, step_of
from esdtool.report.tables.experts import fold_experts

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def steps(make_llama: Callable[..., Tensors], tmp_path: Path) -> list[str]:
    """Folders step_5, step_10, step_100, as the shell would order them."""
    for seed, step in enumerate((100, 10, 5)):
        folder = tmp_path / f"step_{step}"
        folder.mkdir()
        save_file(make_llama(layers=1, seed=seed), folder / "model.safetensors")
    return [f"{tmp_path}/step_{step}" for step in (10, 100, 5)]


def test_one_analysis_each_and_a_table(esdtool_cli, steps: list[str]) -> None:
    result = esdtool_cli("analyze", *steps, "--json", "-")
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert document["format"] == "esdtool.trajectory"
    assert [step["step"] for step in document["steps"]] == [5, 10, 100]
    for step, analysis in zip(document["steps"], document["analyses"], strict=True):
        assert step["checkpoint"] == analysis["source"]["checkpoint"]
        single = esdtool.analyze(step["checkpoint"])
        assert [module["alpha"] for module in analysis["modules"]] == [module.alpha for module in single.modules]
        assert step["alpha_by_role"]["q_proj"] == single.modules[0].alpha
        assert step["mean_alpha"] == pytest.approx(fmean(module.alpha for module in single.modules))


def test_the_table_in_the_terminal_and_as_csv(esdtool_cli, steps: list[str], tmp_path: Path) -> None:
    result = esdtool_cli("analyze", *steps, "--csv", tmp_path / "out.csv")
    table = result.stdout.split("alpha by role over the checkpoints")[1]
    rows = [line.split() for line in table.splitlines() if line.split()[:1] and line.split()[0] in steps]
    assert [row[0] for row in rows] == [steps[2], steps[0], steps[1]]
    assert len(rows[0]) == 2 + 7
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert [line["step"] for line in lines] == [step for step in ("5", "10", "100") for _ in range(7)]
    assert float(lines[0]["alpha"]) == pytest.approx(float(rows[0][2]), abs=1e-3)


def test_a_bad_checkpoint_among_them_is_told_before_the_work(esdtool_cli, steps: list[str], tmp_path: Path) -> None:
    result = esdtool_cli("analyze", *steps, tmp_path / "step_7", "--json", tmp_path / "out.json")
    assert result.returncode == 1
    assert "step_7: no such file or directory" in result.stderr
    assert not (tmp_path / "out.json").exists()


def test_eigenvalues_are_for_one_checkpoint(esdtool_cli, steps: list[str], tmp_path: Path) -> None:
    result = esdtool_cli("analyze", *steps, "--esd", tmp_path / "esd.safetensors")
    assert result.returncode == 2
    assert "--esd takes one checkpoint at a time" in result.stderr


@pytest.mark.parametrize(
    ("name", "step"),
    [("step_100", 100), ("a/checkpoint-2000/", 2000), ("llama7b-step3.safetensors", 3), ("final", None)],
)
def test_steps_are_read_off_names(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_names_without_steps_stay_in_their_order() -> None:
    assert in_order_of_training(["x/step_2", "base", "x/step_1"]) == ["x/step_2", "base", "x/step_1"]
    assert in_order_of_training(["a/7b", "b/7b"]) == ["a/7b", "b/7b"]


def test_roles_that_come_and_go(make_llama: Callable[..., Tensors]) -> None:
    whole = make_llama(layers=1)
    part = {name: weight for name, weight in whole.items() if "mlp" in name}
    trajectory = make_trajectory([esdtool.analyze(part), esdtool.analyze(whole)])
    assert trajectory.roles == ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")
    assert set(trajectory.steps[0].alpha_by_role) == {"gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Two layers of three experts, stacked; in layer 1 one expert is broken."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp"
        tensors[f"{prefix}.experts.gate_up_proj"] = torch.randn(3, 128, 60, generator=generator)
        tensors[f"{prefix}.experts.down_proj"] = torch.randn(3, 60, 64, generator=generator)
        tensors[f"{prefix}.gate.weight"] = torch.randn(3, 60, generator=generator)
    tensors["model.layers.1.mlp.experts.down_proj"][2, 0, 0] = torch.nan
    save_file(tensors, tmp_path / "mixture.safetensors")
    return tmp_path / "mixture.safetensors"


def test_experts_are_averaged_by_layer(mixture: Path) -> None:
    analysis = esdtool.analyze(mixture)
    assert len(analysis.modules) == 18
    rows = fold_experts(analysis.modules)
    assert [row.name for row in rows] == [
        f"model.layers.{layer}.mlp.experts.*.{role} ({'2 of 3' if (layer, role) == (1, 'down_proj') else '3'})"
        for layer in range(2)
        for role in ("gate_proj", "up_proj", "down_proj")
    ]
    by_name = {module.name: module for module in analysis.modules}
    gates = [by_name[f"model.layers.0.mlp.experts.{expert}.gate_proj"] for expert in range(3)]
    assert rows[0].alpha == pytest.approx(fmean(module.alpha for module in gates))
    assert rows[5].alpha == pytest.approx(
        fmean(by_name[f"model.layers.1.mlp.experts.{expert}.down_proj"].alpha for expert in range(2))
    )


def test_the_table_of_experts(esdtool_cli, mixture: Path, tmp_path: Path) -> None:
    folded = esdtool_cli("analyze", mixture, "--json", tmp_path / "out.json").stdout
    assert "experts averaged by layer" in folded
    assert "model.layers.0.mlp.experts.*.gate_proj (3)" in folded
    assert "experts.1.gate_proj" not in folded.split("alpha by role")[0]
    assert len(json.loads((tmp_path / "out.json").read_text())["modules"]) == 18
    every = esdtool_cli("analyze", mixture, "--experts", "all").stdout
    assert "model.layers.0.mlp.experts.1.gate_proj" in every
    assert "averaged" not in every


def test_a_dry_run_lists_the_experts_of_a_layer_once(esdtool_cli, mixture: Path) -> None:
    shown = esdtool_cli("analyze", mixture, "--dry-run").stdout
    assert "18 weight modules" in shown
    assert "model.layers.1.mlp.experts.*.down_proj (3)" in shown
    assert "experts.1." not in shown


def test_a_stack_has_one_decay_that_names_its_members(mixture: Path) -> None:
    analysis = esdtool.analyze(mixture, exclude=["layers.1"])
    assignment = esdtool.assign(analysis, weight_decay=0.1)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    members = assignment.members[name]
    assert members.members == tuple(
        f"model.layers.0.mlp.experts.{expert}.{role}" for expert in range(3) for role in ("gate_proj", "up_proj")
    )
    assert members.aggregate == "parameter-weighted mean"
    alphas = {module.name: module.alpha for module in analysis.modules}
    low, high = min(alphas.values()), max(alphas.values())
    ratios = [0.67 + (alphas[member] - low) / (high - low) * (5 - 0.67) for member in members.members]
    entry = assignment.parameters[name]
    assert entry.ratio == pytest.approx(fmean(ratios))
    assert entry.alpha == pytest.approx(fmean(alphas[member] for member in members.members))
    assert (entry.role, entry.shape) == ("gate_proj+up_proj", (3, 128, 60))


def test_normalized_decays_of_fused_parameters_keep_the_mean(mixture: Path) -> None:
    assignment = esdtool.assign(esdtool.analyze(mixture, exclude=["layers.1"]), weight_decay=0.1, normalize=True)
    sizes = {name: torch.Size(entry.shape).numel() for name, entry in assignment.parameters.items()}
    mean = sum(entry.weight_decay * sizes[name] for name, entry in assignment.parameters.items()) / sum(sizes.values())
    assert mean == pytest.approx(0.1)
