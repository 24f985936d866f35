"""Differences from a base: the spectra of W - W_base, whichever way either side stores its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import esdtool
from esdtool.checkpoint import from_state_dict
from esdtool.errors import NothingToAnalyzeError, UsageError

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def base(make_llama: Callable[..., Tensors]) -> Tensors:
    return make_llama(layers=2)


@pytest.fixture
def tuned(base: Tensors) -> Tensors:
    """The base after a small change of low stable rank to every matrix."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: weight + 0.01 * torch.randn(weight.shape, generator=generator) * torch.logspace(0, -1, weight.shape[-1])
        for name, weight in base.items()
    }


def _expected(tuned: Tensors, base: Tensors, name: str) -> np.ndarray:
    change = (tuned[name] - base[name]).double().numpy()
    return np.sort(np.linalg.svd(change, compute_uv=False))


def test_the_spectra_are_those_of_the_change(tuned: Tensors, base: Tensors) -> None:
    analysis = esdtool.analyze(from_state_dict(tuned), base=from_state_dict(base, location="the base"))
    assert analysis.source.base == "the base"
    assert len(analysis.scored) == 14
    for module in analysis.modules:
        np.testing.assert_allclose(
            np.sqrt(analysis.esds[module.name]), _expected(tuned, base, module.parameter), rtol=1e-4, atol=1e-6
        )


def test_shards_pickles_and_prefixes_do_not_matter(tuned: Tensors, base: Tensors, tmp_path: Path) -> None:
    save_file(tuned, tmp_path / "tuned.safetensors")
    bare = {name.removeprefix("model."): weight for name, weight in base.items()}
    torch.save({"state_dict": bare}, tmp_path / "base.pt")
    whole = esdtool.analyze(tuned, base=base)
    other = esdtool.analyze(tmp_path / "tuned.safetensors", base=tmp_path / "base.pt")
    assert [module.alpha for module in other.modules] == [module.alpha for module in whole.modules]
    assert not [tensor for tensor in other.skipped if "base" in tensor.reason]


def test_a_fused_projection_meets_its_parts(tuned: Tensors, base: Tensors) -> None:
    fused = dict(tuned)
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        parts = [fused.pop(f"{attention}.{role}_proj.weight") for role in "qkv"]
        fused[f"{attention}.qkv_proj.weight"] = torch.cat(parts)
    separate, joined = esdtool.analyze(tuned, base=base), esdtool.analyze(fused, base=base)
    assert {m.name: m.alpha for m in joined.modules} == pytest.approx({m.name: m.alpha for m in separate.modules})


def test_stacked_experts_meet_their_files() -> None:
    generator = torch.Generator().manual_seed(0)
    prefix = "model.layers.0.mlp.experts"
    stacked = {
        f"{prefix}.gate_up_proj": torch.randn(2, 120, 64, generator=generator),
        f"{prefix}.down_proj": torch.randn(2, 64, 60, generator=generator),
    }
    files = {}
    for expert in range(2):
        gate, up = stacked[f"{prefix}.gate_up_proj"][expert].chunk(2)
        down = stacked[f"{prefix}.down_proj"][expert]
        for name, weight in {"gate_proj": gate, "up_proj": up, "down_proj": down}.items():
            files[f"{prefix}.{expert}.{name}.weight"] = weight + 0.1 * torch.randn(weight.shape, generator=generator)
    analysis = esdtool.analyze(files, base=stacked)
    assert len(analysis.scored) == 6
    gate = (files[f"{prefix}.1.gate_proj.weight"] - stacked[f"{prefix}.gate_up_proj"][1, :60]).double().numpy()
    np.testing.assert_allclose(
        np.sqrt(analysis.esds[f"{prefix}.1.gate_proj"]), np.sort(np.linalg.svd(gate, compute_uv=False)), rtol=1e-4
    )


def test_what_has_no_counterpart_is_listed(tuned: Tensors, base: Tensors) -> None:
    only_base = base | {"model.layers.2.mlp.up_proj.weight": torch.randn(172, 64)}
    resized = tuned | {
        "model.layers.0.mlp.up_proj.weight": torch.randn(180, 64),
        "model.layers.7.mlp.up_proj.weight": torch.randn(172, 64),
    }
    analysis = esdtool.analyze(
        from_state_dict(resized, location="new"), base=from_state_dict(only_base, location="old")
    )
    reasons = {tensor.name: tensor.reason for tensor in analysis.skipped}
    assert reasons["model.layers.0.mlp.up_proj"] == "shape 180x64, but 172x64 in the base old"
    assert reasons["model.layers.7.mlp.up_proj"] == "not in the base old"
    assert reasons["model.layers.2.mlp.up_proj"] == "only in the base: new has no such module"
    assert len(analysis.modules) == 13


def test_unchanged_modules_say_so(tuned: Tensors, base: Tensors) -> None:
    name = "model.layers.1.mlp.up_proj"
    analysis = esdtool.analyze(tuned | {f"{name}.weight": base[f"{name}.weight"]}, base=base)
    (module,) = [module for module in analysis.modules if module.name == name]
    assert module.status == "unchanged: equal to the base to the last bit"
    assert analysis.summary.num_scored == 13


def test_a_change_that_is_nothing_but_rounding_has_no_alpha(base: Tensors) -> None:
    # The same weights saved twice, once in bfloat16: all that differs is the rounding.
    rounded = {name: weight.to(torch.bfloat16) for name, weight in base.items()}
    analysis = esdtool.analyze(rounded, base=base)
    assert {module.status.split(":")[0] for module in analysis.modules} == {"rank-deficient"}


def test_nothing_in_common_is_an_error(tuned: Tensors) -> None:
    other = {"encoder.layer.0.attention.self.query.weight": torch.randn(32, 32)}
    with pytest.raises(NothingToAnalyzeError, match=r"no weight matrix to analyse .* not in the base memory"):
        esdtool.analyze(tuned, base=other)


def test_decays_do_not_follow_differences(tuned: Tensors, base: Tensors) -> None:
    with pytest.raises(UsageError, match=r"differences from memory; .* analyse without --base"):
        esdtool.assign(esdtool.analyze(tuned, base=base))


def test_from_the_command_line(esdtool_cli, tuned: Tensors, base: Tensors, tmp_path: Path) -> None:
    save_file(tuned, tmp_path / "tuned.safetensors")
    save_file(base | {"model.layers.5.mlp.up_proj.weight": torch.ones(3, 4)}, tmp_path / "base.safetensors")
    result = esdtool_cli("analyze", tmp_path / "tuned.safetensors", "--base", tmp_path / "base.safetensors")
    assert result.returncode == 0
    assert f"{tmp_path / 'tuned.safetensors'} minus {tmp_path / 'base.safetensors'}" in result.stdout
    assert "model.layers.5.mlp.up_proj: only in the base" in result.stderr
    # A difference is not what `esdtool assign` takes up.
    assert "no analysis yet" in esdtool_cli("assign", "--out", tmp_path / "wd.json").stderr
