"""Quantised checkpoints from the file to the analysis: what is scored, what is not, and what is read for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import esdtool
from esdtool.checkpoint import from_state_dict, open_checkpoint
from esdtool.checkpoint.memory import MemoryCheckpoint
from esdtool.modules import select_modules

Tensors = dict[str, torch.Tensor]
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def bnb() -> ModuleType:
    """`bitsandbytes.functional`, which runs these on the CPU."""
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes has no build for this machine")


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_scale_may_be_in_another_shard(tmp_path: Path) -> None:
    codes, scale = _random(128, 256).to(torch.float8_e4m3fn), _random(1, 2, seed=1).abs()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({f"{NAME}.weight": codes}, tmp_path / shards[0])
    save_file({f"{NAME}.weight_scale_inv": scale}, tmp_path / shards[1])
    weight_map = {f"{NAME}.weight": shards[0], f"{NAME}.weight_scale_inv": shards[1]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    analysis = esdtool.analyze(tmp_path)
    (module,) = analysis.modules
    singular = np.linalg.svd((codes.float() * scale.repeat_interleave(128, 1)).double().numpy(), compute_uv=False)
    np.testing.assert_allclose(np.sqrt(analysis.esds[NAME]), singular[::-1], rtol=1e-6)
    assert module.dtype == "float8_e4m3fn, 128x128 scales"
    assert [tensor.reason for tensor in analysis.skipped] == ["scale or zero point of quantised weights"]
    assert any("not the originals" in note for note in open_checkpoint(tmp_path).notes)


def test_codes_of_one_byte_with_a_scale_for_each_row() -> None:
    codes, scale = (_random(48, 60) * 40).to(torch.int8), _random(48, 1, seed=1)
    checkpoint = from_state_dict({f"{NAME}.weight.qweight": codes, f"{NAME}.weight.scale": scale})
    torch.testing.assert_close(checkpoint.read(f"{NAME}.weight"), codes * scale)
    assert [module.name for module in select_modules(checkpoint.tensors.values()).modules] == [NAME]


@pytest.mark.parametrize(
    "tensors",
    [
        {"h.0.fc.W_q": torch.zeros(8, 8, dtype=torch.uint8), "h.0.fc.scale": torch.ones(8, 1)},  # HQQ
        {"h.0.fc.codes": torch.zeros(8, 8, 2, dtype=torch.int8), "h.0.fc.codebooks": torch.ones(2, 256, 1, 8)},  # AQLM
        {"h.0.fc.weight": torch.zeros(8, 8, dtype=torch.int8)},  # no scale at all
    ],
)
def test_codes_of_other_formats_are_never_scored(tensors: Tensors) -> None:
    checkpoint = from_state_dict(tensors | {"h.0.up.weight": _random(64, 64)})
    assert [m.name for m in select_modules(checkpoint.tensors.values()).modules] == ["h.0.up"]
    assert any("cannot be de-quantised" in note for note in checkpoint.notes)


def test_plain_checkpoints_are_left_alone(make_llama: Callable[..., Tensors]) -> None:
    assert isinstance(from_state_dict(make_llama()), MemoryCheckpoint)


def test_only_the_experts_that_are_asked_for_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    blocks, scales = torch.zeros(4, 40, 2, 16, dtype=torch.uint8), torch.full((4, 40, 2), 127, dtype=torch.uint8)
    stored = from_state_dict({f"{name}_blocks": blocks, f"{name}_scales": scales})
    read: list[int] = []

    def read_rows(self: Any, tensor: str, start: int, stop: int) -> torch.Tensor:
        read.append(stop - start)
        return self.values[tensor][start:stop]

    monkeypatch.setattr(MemoryCheckpoint, "read_rows", read_rows)
    monkeypatch.setattr(MemoryCheckpoint, "read", None)
    assert stored.read_rows(name, 2, 3).shape == (1, 64, 40)
    assert read == [1, 1]


def test_a_low_rank_weight_in_4_bits_is_not_scored_on_its_rounding(bnb: ModuleType) -> None:
    weight = _random(256, 16) @ _random(16, 256, seed=1)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    tensors = {f"{NAME}.weight": codes}
    tensors |= {f"{NAME}.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    (module,) = esdtool.analyze(from_state_dict(tensors)).modules
    assert module.status.startswith("rank-deficient")
    assert module.dtype == "nf4"
