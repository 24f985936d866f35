"""The page on extending is true: its family, estimator, figure and policy work as they stand there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import esdtool
from esdtool.modules import classify
from esdtool.modules.families import load_families
from tests.docs.pages import ROOT, Block, blocks, run_python

PAGE = blocks("extending.md")
FOREIGN = "weight_decay.final_ratio=0.5"


def code(title: str) -> str:
    (block,) = [block for block in PAGE if block.title == title]
    return block.text


def apply(block: Block, root: Path) -> None:
    """One hunk of the page on a copy of the package: what it removes and keeps must be there once, wherever."""
    path = root / str(block.title)
    lines = block.text.splitlines()
    old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    text = path.read_text()
    assert text.count(old) == 1, f"{block.title}: the page's hunk does not fit any more:\n{block.text}"
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package into which the page's files and changes have gone."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "esdtool", root / "esdtool", ignore=shutil.ignore_patterns("__pycache__"))
    for block in PAGE:
        if block.title and block.title.startswith("esdtool/") and block.language == "python":
            assert not (root / block.title).exists()
            (root / block.title).write_text(block.text)
        elif block.language == "diff":
            apply(block, root)
    return root


def run(root: Path, *words: str) -> str:
    return run_python(["-m", "esdtool", *words], root)


def rank_alpha(eigenvalues: np.ndarray) -> float:
    """The oracle: the regression by scipy."""
    tail = np.sort(eigenvalues)[eigenvalues.size // 2 :]
    return float(1 - scipy.stats.linregress(np.log(tail), np.log(np.arange(tail.size, 0, -1) - 0.5)).slope)


def test_family(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    exec(code("esdtool/modules/families/sparrow.py"), names)
    families = (names["FAMILY"], *load_families())
    generator = torch.Generator().manual_seed(0)
    shapes = {"mixer_in": (192, 64), "mixer_out": (64, 64), "wide": (256, 64), "narrow": (64, 256), "lookup": (100, 64)}
    state = {
        f"blocks.{layer}.{name}.weight": torch.randn(shape, generator=generator)
        for layer in range(2)
        for name, shape in shapes.items()
    }
    assert "q_proj" not in {module.role for module in esdtool.analyze(state).modules}
    monkeypatch.setattr(classify, "load_families", lambda: families)
    analysis = esdtool.analyze(state)
    roles = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    assert sorted((module.layer, module.role) for module in analysis.modules) == sorted(
        (layer, role) for layer in range(2) for role in roles
    )
    key = next(module for module in analysis.modules if module.role == "k_proj" and module.layer == 1)
    expected = torch.linalg.svdvals(state["blocks.1.mixer_in.weight"][64:128].double()).square().flip(0)
    np.testing.assert_allclose(analysis.esds[key.name], expected.numpy(), rtol=1e-9)
    assert {(tensor.name, tensor.reason) for tensor in analysis.skipped} == {
        (f"blocks.{layer}.lookup.weight", "learned tokens") for layer in range(2)
    }


def test_container(extended: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weights = {f"layers.{layer}.q_proj.weight": generator.standard_normal((64, 80)) for layer in range(2)}
    path = tmp_path / "folder" / "weights.npz"
    path.parent.mkdir()
    np.savez(path, **weights)
    (path.parent / "config.json").write_text('{"model_type": "llama"}')
    expected = esdtool.analyze({name: torch.from_numpy(array) for name, array in weights.items()})
    for location in (path, path.parent):
        modules = json.loads(run(extended, "analyze", str(location), "--json", "-"))["modules"]
        assert {module["name"]: module["alpha"] for module in modules} == pytest.approx(
            {module.name: module.alpha for module in expected.scored}
        )
    assert ".npz" in run(extended, "analyze", "--help")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AssertionError, match=r"weights\.npz: truncated: a zip archive without its directory"):
        run(extended, "analyze", str(path))


def test_own_numbers(tmp_path: Path, bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code("mine.py"), names)
    decays = esdtool.load_assignment("mine.json").decays
    esds = esdtool.analyze(bundled).esds
    alphas = {name: rank_alpha(esds[name.removesuffix(".weight")]) for name in decays}
    middle = float(np.median(list(alphas.values())))
    assert len(decays) == 35
    assert decays == pytest.approx({name: 0.1 * alpha / middle for name, alpha in alphas.items()})


def test_estimator(extended: Path, bundled: Path) -> None:
    output = run(extended, "analyze", str(bundled), "--fit", "rank", "--fit", "hill", "--json", "-")
    esds = esdtool.analyze(bundled).esds
    modules = json.loads(output)["modules"]
    assert len(modules) == 35
    for module in modules:
        assert module["alpha"] == pytest.approx(rank_alpha(esds[module["name"]]), rel=1e-9)
        assert module["alpha"] != module["alphas"]["hill"]
        assert 1 < module["mp_alpha"] != module["alpha"]
    assert "rank" in run(extended, "analyze", "--help")


def test_estimator_in_training(extended: Path) -> None:
    quickstart = ROOT / "examples" / "configs" / "quickstart.toml"
    resolved = run(extended, "train", str(quickstart), "--set", "weight_decay.fit=rank", "--print-config")
    assert tomllib.loads(resolved)["weight_decay"]["fit"] == "rank"


def test_figure(extended: Path, bundled: Path, tmp_path: Path) -> None:
    assert "stable rank against alpha" in " ".join(run(extended, "plot", "--help").replace("│", " ").split())
    run(extended, "plot", str(bundled), "--kind", "ranks", "--format", "svg", "--out", str(tmp_path))
    points = (tmp_path / "ranks.svg").read_text().split('id="modules"')[1].split("</g>\n   </g>")[0]
    assert points.count("<use") == 35
    assert "ranks.svg" in {path.name for path in tmp_path.iterdir()}
    run(extended, "analyze", str(bundled), "--plots", str(tmp_path / "all"), "--quiet")
    assert (tmp_path / "all" / "ranks.png").exists()


def test_policy(extended: Path, tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"text number {number} of a small corpus. " * 80)
    config = tmp_path / "annealed.toml"
    config.write_text(
        f"""
        model = {{ preset = "llama-1m" }}
        data = {{ source = "files", files = "{tmp_path}/*.txt", validation_fraction = 0.3 }}
        tokenizer = {{ train_vocab_size = 264 }}
        batch = {{ global_size = 2, micro_size = 2, sequence_length = 16 }}
        schedule = {{ steps = 4, warmup_steps = 1 }}
        weight_decay = {{ policy = "annealed", base = 0.2, final_ratio = 0.2 }}
        eval = {{ tokens = 32 }}
        logging = {{ every = 1, tensorboard = false }}
        run = {{ dir = "{tmp_path}/run", device = "cpu" }}
        """
    )
    run(extended, "train", str(config), "--quiet")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    means = [line["weight_decay_mean"] for line in lines if line["split"] == "train"]
    assert means == pytest.approx([0.2, 0.16, 0.12, 0.08])
    said = run(extended, "train", str(config), "--print-config", "--set", "weight_decay.final_ratio=0.5")
    assert tomllib.loads(said)["weight_decay"]["final_ratio"] == 0.5
    command = [sys.executable, "-m", "esdtool", "train", str(config)]
    refused = subprocess.run(
        [*command, "--set", "weight_decay.policy=uniform", "--set", FOREIGN],
        cwd=extended,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert refused.returncode == 1
    assert 'final_ratio belongs to weight_decay.policy = "annealed", but the policy is "uniform"' in refused.stderr
