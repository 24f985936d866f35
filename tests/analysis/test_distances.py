"""Distances of two checkpoints: in an analysis with a base, in a comparison, and in every report of both."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import esdtool
from esdtool.analysis.plan import make_plan
from esdtool.cli import app
from esdtool.comparison.document import CheckpointComparison
from esdtool.errors import EsdtoolError
from esdtool.spectra.options import PairOptions, ScoreOptions

Tensors = dict[str, torch.Tensor]
SPIKED = "model.layers.1.mlp.up_proj"


@pytest.fixture
def base(make_llama: Callable[..., Tensors]) -> Tensors:
    return make_llama(layers=2)


@pytest.fixture
def tuned(base: Tensors) -> Tensors:
    """The base after a small change everywhere, and a rank-one spike in one module."""
    generator = torch.Generator().manual_seed(7)
    found = {name: weight + 1e-4 * torch.randn(weight.shape, generator=generator) for name, weight in base.items()}
    left, right = torch.randn(172, 1, generator=generator), torch.randn(1, 64, generator=generator)
    found[f"{SPIKED}.weight"] = found[f"{SPIKED}.weight"] + left @ right
    return found


@pytest.fixture
def files(base: Tensors, tuned: Tensors, tmp_path: Path) -> tuple[Path, Path]:
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def run(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_a_base_gives_the_distance_at_once(base: Tensors, tuned: Tensors) -> None:
    analysis = esdtool.analyze(tuned, base=base)
    for module in analysis.modules:
        old, new = base[module.parameter].double(), tuned[module.parameter].double()
        assert module.distances is not None
        assert module.distances.measure("relative_distance") == pytest.approx(float((new - old).norm() / old.norm()))
        assert module.distances.measure("cka_left") is None
    assert "intruder" not in analysis.to_json().split('"modules"')[0].replace("intruder_", "")
    assert "distances.relative_distance" in analysis.flat_rows()[0]
    assert "distances.cka_left" not in analysis.flat_rows()[0]
    assert all(module.distances is None for module in esdtool.analyze(tuned).modules)
    assert '"distances": {' not in esdtool.analyze(tuned).to_json()


def test_the_intruder_is_found_where_it_was_planted(base: Tensors, tuned: Tensors) -> None:
    analysis = esdtool.analyze(tuned, base=base, distances=True)
    counts = {
        module.name: module.distances and module.distances.measure("num_intruders") for module in analysis.modules
    }
    assert {name: count for name, count in counts.items() if count} == {SPIKED: 1}
    assert analysis.settings.intruder_vectors == 10
    assert esdtool.Analysis.model_validate_json(analysis.to_json()).modules == analysis.modules
    strict = esdtool.analyze(tuned, base=base, distances=True, intruder_similarity=1.0)
    assert sum(module.distances.measure("num_intruders") for module in strict.modules if module.distances) > 20


def test_names_transposes_and_fused_projections_do_not_matter(base: Tensors, tuned: Tensors) -> None:
    fused = {name.removeprefix("model."): weight for name, weight in base.items() if "_proj" in name}
    prefix = "layers.1.self_attn"
    parts = [fused.pop(f"{prefix}.{role}_proj.weight") for role in "qkv"]
    fused[f"{prefix}.qkv_proj.weight"] = torch.cat(parts)
    fused["layers.0.mlp.down_proj.weight"] = fused["layers.0.mlp.down_proj.weight"].T.contiguous()
    whole = esdtool.analyze(tuned, base=base, distances=True)
    other = esdtool.analyze(tuned, base=fused, distances=True)
    for one, two in zip(whole.modules, other.modules, strict=True):
        assert one.distances is not None
        assert two.distances is not None
        # The last digits of the products follow the order in memory.
        for name, value in one.distances:
            assert getattr(two.distances, name) == (None if value is None else pytest.approx(value, rel=1e-6, abs=1e-5))


def test_a_comparison_measures_the_same(
    files: tuple[Path, Path], base: Tensors, tuned: Tensors, tmp_path: Path
) -> None:
    outputs = {kind: tmp_path / f"c.{kind}" for kind in ("json", "csv", "html")}
    run(
        "compare",
        *files,
        "--distances",
        "-q",
        *(word for kind, path in outputs.items() for word in (f"--{kind}", path)),
    )
    comparison = CheckpointComparison.from_json(outputs["json"])
    analysis = esdtool.analyze(tuned, base=base, distances=True)
    expected = {module.name: module.distances for module in analysis.modules}
    assert {module.name: module.sides[1].distances for module in comparison.modules if module.sides[1]} == expected
    assert all(module.sides[0] is not None and module.sides[0].distances is None for module in comparison.modules)
    assert comparison.pairs is not None
    assert comparison.pairs.intruder_similarity == 0.5
    rows = list(csv.DictReader(io.StringIO(outputs["csv"].read_text())))
    found = {row["module"]: row["distances.num_intruders"] for row in rows if row["distances.num_intruders"]}
    assert found == {name: "1" if name == SPIKED else "0" for name in expected}
    page = outputs["html"].read_text()
    assert "overlap 16 left" in page
    assert f"most: {SPIKED} (1)" in page


def test_tables_and_words_for_people(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    old, new = files
    words = f"1 intruder dimension below a similarity of 0.5 in 1 of 14 modules, most: {SPIKED} (1)"
    for command in (["compare", old, new], ["analyze", new, "--base", old]):
        run(*command, "--distances", "--format", "markdown")
        shown = capsys.readouterr().out
        assert words in shown
        assert "CKA left" in shown
    run("analyze", new, "--base", old, "--html", tmp_path / "a.html")
    shown = capsys.readouterr().out
    assert "distance" in shown
    assert "intruder" not in shown
    assert ">distance<" in (tmp_path / "a.html").read_text()
    run("compare", old, new, "--format", "csv")
    header = capsys.readouterr().out.splitlines()[0]
    assert header.endswith("distances.relative_distance")


def test_weights_that_are_not_finite_and_a_missing_module(
    files: tuple[Path, Path], tuned: Tensors, tmp_path: Path
) -> None:
    broken = {name: weight.clone() for name, weight in tuned.items()}
    broken[f"{SPIKED}.weight"][0, 0] = float("nan")
    del broken["model.layers.0.mlp.up_proj.weight"]
    broken["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 172)
    broken["model.layers.0.mlp.gate_proj.weight"] = torch.randn(100, 64)
    save_file(broken, tmp_path / "broken.safetensors")
    run("compare", files[0], tmp_path / "broken.safetensors", "--distances", "-q", "--json", tmp_path / "c.json")
    document = json.loads((tmp_path / "c.json").read_text())
    sides = {module["name"]: module["sides"][1] for module in document["modules"]}
    assert "distances" not in sides[SPIKED]
    assert "NaN" in sides[SPIKED]["verdict"]
    zero = sides["model.layers.0.mlp.down_proj"]["distances"]
    assert (zero["relative_distance"], zero["cka_left"]) == (1.0, None)
    reasons = {module["name"]: module["reason"] for module in document["unmatched"]}
    assert reasons["model.layers.0.mlp.up_proj"] == "not in broken.safetensors"
    assert "172 x 64" in reasons["model.layers.0.mlp.gate_proj"].replace("x", " x ").replace("  ", " ")


def test_what_has_no_weights_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    run("analyze", files[0], "-q", "--json", tmp_path / "a.json")
    with pytest.raises(EsdtoolError, match="needs the weights"):
        run("compare", tmp_path / "a.json", files[1], "--distances", "-q")
    with pytest.raises(EsdtoolError, match="name it with --base"):
        run("analyze", files[1], "--distances", "-q")


def test_a_merged_adapter_is_compared_with_its_base(base: Tensors, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    factors = {"A": torch.randn(2, 64, generator=generator), "B": torch.randn(64, 2, generator=generator)}
    save_file(
        {f"{name}.lora_{part}.weight": value for part, value in factors.items()}, tmp_path / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    analysis = esdtool.analyze(tmp_path, base=base, distances=True)
    (found,) = [module for module in analysis.modules if module.distances is not None]
    assert found.name == "model.layers.1.self_attn.q_proj"
    weight = base[f"{found.name}.weight"].double()
    update = (factors["B"] @ factors["A"]).double()
    assert found.distances is not None
    assert found.distances.measure("relative_distance") == pytest.approx(float(update.norm() / weight.norm()), rel=1e-5)
    similarity = np.abs(np.linalg.svd(weight.numpy())[0].T @ np.linalg.svd((weight + update).numpy())[0][:, :10]).max(
        axis=0
    )
    assert found.distances.measure("num_intruders") == (similarity < 0.5).sum() > 0


def test_a_kernel_is_compared_as_what_acts_on_a_patch() -> None:
    generator = torch.Generator().manual_seed(0)
    name = "stage.0.conv.weight"
    base, other = (torch.randn(64, 60, 3, 3, generator=generator) for _ in range(2))
    (module,) = esdtool.analyze({name: other}, base={name: base}, distances=True).modules
    first, second = (kernel.permute(0, 2, 3, 1).reshape(64, -1).double().numpy() for kernel in (base, other))
    assert module.distances is not None
    cross = np.linalg.svd(first)[0][:, :4].T @ np.linalg.svd(second)[0][:, :4]
    assert module.distances.measure("overlap_left_4") == pytest.approx((cross**2).sum() / 4, abs=1e-6)


def test_memory_counts_the_vectors(base: Tensors, tuned: Tensors) -> None:
    plans = [
        make_plan(tuned, ScoreOptions(), base=base, jobs=1, pairs=PairOptions(distances=distances))
        for distances in (False, True)
    ]
    assert plans[1].peak_bytes >= plans[0].peak_bytes + 8 * 8 * 64**2
