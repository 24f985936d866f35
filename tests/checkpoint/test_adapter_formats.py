"""Adapters as libraries other than PEFT write them, against the map that torch's modules apply with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import esdtool
from esdtool.checkpoint import from_state_dict, open_checkpoint
from esdtool.checkpoint.adapters import merged
from esdtool.errors import CheckpointError

Tensors = dict[str, torch.Tensor]

IN, OUT, RANK = 24, 40, 4
BASE = {
    "unet.mid_block.attn1.to_q.weight": (OUT, IN),
    "unet.mid_block.attn1.to_out.0.weight": (OUT, IN),
    "unet.mid_block.conv_in.weight": (OUT, IN, 3, 3),
}


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(RANK, IN), torch.randn(OUT, RANK)


SPELLINGS = [
    ("unet.mid_block.attn1.to_q.lora_down.weight", "unet.mid_block.attn1.to_q.lora_up.weight"),
    ("unet.mid_block.attn1.to_q.lora_A.weight", "unet.mid_block.attn1.to_q.lora_B.weight"),
    ("unet.mid_block.attn1.to_q.lora_A.default.weight", "unet.mid_block.attn1.to_q.lora_B.default.weight"),
    ("unet.mid_block.attn1.to_q.lora_A", "unet.mid_block.attn1.to_q.lora_B"),
    ("unet.mid_block.attn1.to_q.lora.down.weight", "unet.mid_block.attn1.to_q.lora.up.weight"),
    ("unet.mid_block.attn1.to_q_lora.down.weight", "unet.mid_block.attn1.to_q_lora.up.weight"),
    ("unet.mid_block.attn1.processor.to_q_lora.down.weight", "unet.mid_block.attn1.processor.to_q_lora.up.weight"),
    (
        "unet.mid_block.attn1.to_q.lora_linear_layer.down.weight",
        "unet.mid_block.attn1.to_q.lora_linear_layer.up.weight",
    ),
    ("unet.mid_block.attn1.to_q.lora_a.weight", "unet.mid_block.attn1.to_q.lora_b.weight"),
    ("unet.mid_block.attn1.to_q.adapter.linear_in.weight", "unet.mid_block.attn1.to_q.adapter.linear_out.weight"),
    (
        "base_model.model.unet.mid_block.attn1.to_q.lora_A.weight",
        "base_model.model.unet.mid_block.attn1.to_q.lora_B.weight",
    ),
    ("lora_unet_mid_block_attn1_to_q.lora_down.weight", "lora_unet_mid_block_attn1_to_q.lora_up.weight"),
    ("lycoris_mid_block_attn1_to_q.lora_down.weight", "lycoris_mid_block_attn1_to_q.lora_up.weight"),
]


@pytest.mark.parametrize(("down_name", "up_name"), SPELLINGS)
def test_every_spelling_is_the_product(down_name: str, up_name: str) -> None:
    torch.manual_seed(0)
    down, up = _pair()
    alpha = {down_name.rpartition(".lora_down")[0] + ".alpha": torch.tensor(2.0)} if ".lora_down" in down_name else {}
    adapter = from_state_dict({down_name: down, up_name: up} | alpha)
    expected = up @ down * (2.0 / RANK if alpha else 1.0)
    ((name, info),) = adapter.tensors.items()
    assert info.rank == RANK
    torch.testing.assert_close(adapter.read(name), expected)
    base = from_state_dict({key: torch.randn(shape) for key, shape in BASE.items()})
    result = merged(adapter, base)
    target = "unet.mid_block.attn1.to_q.weight"
    torch.testing.assert_close(result.read(target), base.read(target) + expected)
    (module,) = esdtool.analyze(adapter, min_eigs=2).modules
    assert module.num_eigs == RANK


def test_the_output_of_an_attention_processor_is_its_first_module() -> None:
    down, up = _pair()
    stem = "unet.mid_block.attn1.processor.to_out_lora"
    adapter = from_state_dict({f"{stem}.down.weight": down, f"{stem}.up.weight": up})
    assert list(adapter.tensors) == ["unet.mid_block.attn1.to_out.0.weight"]


@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (3,)])
def test_locon_with_a_middle_is_three_convolutions(kernel: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    conv = functional.conv2d if len(kernel) == 2 else functional.conv1d
    ones = (1,) * len(kernel)
    down, up = torch.randn(RANK, IN, *ones), torch.randn(OUT, RANK, *ones)
    middle = torch.randn(RANK, RANK, *kernel)
    stem = "lora_unet_mid_block_conv_in"
    adapter = from_state_dict(
        {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.lora_mid.weight": middle,
            f"{stem}.alpha": torch.tensor(1.0),
        }
    )
    x = torch.randn(2, IN, *(9,) * len(kernel))
    expected = conv(conv(conv(x, down), middle), up) / RANK
    torch.testing.assert_close(conv(x, adapter.read(f"{stem}.weight")), expected, rtol=1e-3, atol=1e-3)
    (module,) = esdtool.analyze(adapter, min_eigs=2).modules
    assert module.num_eigs == RANK * int(np.prod(kernel))


@pytest.mark.parametrize("axis", [0, 1])
def test_lycoris_dora_has_lengths_of_outputs_or_of_inputs(axis: int) -> None:
    torch.manual_seed(0)
    down, up = _pair()
    weight = torch.randn(OUT, IN)
    length = torch.rand(OUT, 1) if axis == 0 else torch.rand(1, IN)
    stem = "unet.mid_block.attn1.to_q"
    adapter = from_state_dict(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.dora_scale": length}
    )
    total = weight + up @ down
    expected = total * length / torch.linalg.vector_norm(total, dim=1 - axis, keepdim=True)
    torch.testing.assert_close(
        merged(adapter, from_state_dict({f"{stem}.weight": weight})).read(f"{stem}.weight"), expected
    )


def test_lengths_that_do_not_fit_are_one_line() -> None:
    down, up = _pair()
    stem = "q_proj"
    parts = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.lora_magnitude_vector": torch.rand(7)}
    result = merged(from_state_dict(parts), from_state_dict({"q_proj.weight": torch.randn(OUT, IN)}))
    with pytest.raises(CheckpointError, match=r"has 7 lengths, but q_proj.weight has 40 outputs"):
        result.read("q_proj.weight")


@pytest.mark.parametrize("square", [False, True])
def test_mlx_stores_factors_the_other_way_round(square: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    width = OUT if square else IN
    a, b = torch.randn(width, RANK), torch.randn(RANK, OUT)
    save_file({"model.layers.0.q_proj.lora_a": a, "model.layers.0.q_proj.lora_b": b}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": RANK, "scale": 20.0}}))
    adapter = open_checkpoint(tmp_path)
    x = torch.randn(5, width)
    torch.testing.assert_close(
        x @ adapter.read("model.layers.0.q_proj.weight").T, 20 * (x @ a @ b), rtol=1e-4, atol=1e-3
    )


def test_lokr_of_lycoris_without_ranks_has_no_scale() -> None:
    w1, w2 = torch.randn(4, 3), torch.randn(10, 8)
    adapter = from_state_dict(
        {"lora_unet_x.lokr_w1": w1, "lora_unet_x.lokr_w2": w2, "lora_unet_x.alpha": torch.tensor(9.0)}
    )
    torch.testing.assert_close(adapter.read("lora_unet_x.weight"), torch.kron(w1, w2))


def test_a_full_difference_is_the_update() -> None:
    adapter = from_state_dict({"lora_unet_x.diff": torch.ones(OUT, IN), "lora_unet_x.diff_b": torch.ones(OUT)})
    assert adapter.read("lora_unet_x.weight").equal(torch.ones(OUT, IN))


class _GGUF:
    """Writes llama.cpp's adapters."""

    def __init__(self, path: Path, alpha: float) -> None:
        gguf = pytest.importorskip("gguf")
        self._writer = gguf.GGUFWriter(str(path), "llama")
        self._writer.add_type("adapter")
        self._writer.add_string("adapter.type", "lora")
        self._writer.add_float32("adapter.lora.alpha", alpha)

    def write(self, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            self._writer.add_tensor(name, tensor.numpy())
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()


@pytest.mark.parametrize(("alpha", "scale"), [(8.0, 2.0), (0.0, 1.0)])
def test_gguf_adapters_are_llama_cpps_update(alpha: float, scale: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    a, b = _pair()
    stacked_a, stacked_b = torch.randn(3, RANK, IN), torch.randn(3, OUT, RANK)
    table, width = torch.randn(50, RANK), torch.randn(IN, RANK)
    _GGUF(tmp_path / "a.gguf", alpha).write(
        {
            "blk.0.attn_q.weight.lora_a": a,
            "blk.0.attn_q.weight.lora_b": b,
            "blk.0.ffn_up_exps.weight.lora_a": stacked_a,
            "blk.0.ffn_up_exps.weight.lora_b": stacked_b,
            "token_embd.weight.lora_a": table,
            "token_embd.weight.lora_b": width,
        }
    )
    adapter = open_checkpoint(tmp_path / "a.gguf")
    torch.testing.assert_close(adapter.read("blk.0.attn_q.weight"), scale * b @ a)
    torch.testing.assert_close(adapter.read("blk.0.ffn_up_exps.weight"), scale * stacked_b @ stacked_a)
    torch.testing.assert_close(adapter.read("token_embd.weight"), scale * table @ width.T)
    found = esdtool.analyze(adapter, min_eigs=2)
    experts = [module for module in found.modules if module.expert is not None]
    assert len(experts) == 3
    for module in experts:
        product = scale * (stacked_b[module.expert] @ stacked_a[module.expert]).double().numpy()
        singular = np.linalg.svd(product, compute_uv=False)[:RANK]
        np.testing.assert_allclose(np.sqrt(found.esds[module.name]), singular[::-1], rtol=1e-4)
    assert any("token embedding" in tensor.reason for tensor in found.skipped)


def test_names_that_only_look_like_an_adapters_make_none() -> None:
    plain = {"activations.0.alpha": torch.ones(8), "mlp.m.weight": torch.randn(64, 64), "conv.diff.bias": torch.ones(3)}
    checkpoint = from_state_dict(plain)
    assert set(checkpoint.tensors) == set(plain)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": None},
        {"lora_alpha": float("1e400")},
        {"r": 0},
        {"r": "8"},
        {"alpha_pattern": {"(a|a)*(a|a)*(a|a)*(a|a)*b": 1}},
        {"alpha_pattern": {"x" * 2000 + "*": 1}},
        {"rank_pattern": {"q": -1}},
        {"rank_pattern": {"q": True}},
        {"target_parameters": "q"},
        {"trainable_token_indices": {"a": ["b"]}},
        {"use_bdlora": 3},
    ],
)
def test_a_strangers_configuration_is_one_line_or_read(config: dict[str, Any], tmp_path: Path) -> None:
    name = "a" * 60
    down, up = _pair()
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "adapter_model.safetensors")
    text = json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 8} | config)
    (tmp_path / "adapter_config.json").write_text(text)
    message = ""
    try:
        assert open_checkpoint(tmp_path).read(f"{name}.weight").isfinite().all()
    except CheckpointError as error:
        message = str(error)
    assert not message or ("adapter_config.json" in message and "\n" not in message)


@pytest.mark.parametrize("shapes", [((0, IN), (OUT, 0)), ((RANK,), (OUT, RANK)), ((3, IN), (OUT, RANK)), ((), ())])
def test_factors_that_do_not_fit_are_named(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    parts = {f"q_proj.lora_{side}.weight": torch.zeros(shape) for side, shape in zip("AB", shapes, strict=True)}
    plain = {"k_proj.weight": torch.randn(64, 64)}
    checkpoint = from_state_dict(parts | plain)
    assert any("q_proj.lora_" in note for note in checkpoint.notes)
    assert [module.parameter for module in esdtool.analyze(checkpoint, min_eigs=4).modules] == ["k_proj.weight"]


def test_attention_with_one_input_projection_is_merged_into_it() -> None:
    down, up = torch.randn(RANK, IN), torch.randn(3 * IN, RANK)
    attention = nn.MultiheadAttention(IN, 2)
    adapter = from_state_dict({"attn.lora_A.weight": down, "attn.lora_B.weight": up})
    base = from_state_dict({f"attn.{name}": tensor for name, tensor in attention.state_dict().items()})
    found = merged(adapter, base).read("attn.in_proj_weight")
    torch.testing.assert_close(found, attention.in_proj_weight.detach() + up @ down)
