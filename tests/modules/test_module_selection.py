"""Tables: what is left out, and why; what include and exclude change."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esdtool.checkpoint.base import TensorInfo
from esdtool.errors import UsageError
from esdtool.modules import Selection, SkipKind, select_modules

Catalogue = Callable[..., list[TensorInfo]]


def _reason(selection: Selection, name: str) -> str:
    (reason,) = (tensor.reason for tensor in selection.skipped if tensor.name == name)
    return reason


def _roles(selection: Selection) -> dict[str, str]:
    return {module.parameter: module.role for module in selection.modules}


FUSED_QKV = "fused: q_proj, k_proj and v_proj"
SKIPPED: list[tuple[str, tuple[int, ...], str, str]] = [
    # name, shape, dtype, start of the reason
    ("gpt_neox.layers.0.attention.query_key_value.weight", (24, 8), "float32", FUSED_QKV),
    ("model.layers.0.attention.wqkv.weight", (24, 8), "float32", FUSED_QKV),
    ("model.layers.0.self_attn.qkv_proj.weight", (16, 8), "float32", FUSED_QKV),
    ("deberta.encoder.layer.0.attention.self.in_proj.weight", (24, 8), "float32", FUSED_QKV),
    ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", (6, 8), "float32", "fused: kv_a_proj and k_pe_proj"),
    ("model.layers.0.self_attn.kv_b_proj.weight", (16, 4), "float32", "fused: k_b_proj and v_b_proj"),
    ("model.layers.0.linear_attn.in_proj_qkvz.weight", (32, 8), "float32", "fused: q_proj, k_proj, v_proj and z_proj"),
    ("model.layers.0.mlp.experts.gate_up_proj", (4, 32, 8), "float32", "stacked: fused gate_proj and up_proj"),
    ("lstm.weight_ih_l0", (32, 6), "float32", "weight of a recurrent layer"),
    ("transformer.blocks.0.ffn.experts.mlp.w1", (64, 8), "bfloat16", "stacked: gate_proj of all experts"),
    ("transformer.blocks.0.ffn.experts.mlp.v1", (64, 8), "bfloat16", "stacked: up_proj of all experts"),
    ("transformer.blocks.0.ffn.experts.mlp.w2", (64, 8), "bfloat16", "stacked: down_proj of all experts"),
    ("layers.0.mix.weight", (8, 16, 2048), "float32", "3-D weight (8x16x2048): a convolution or stacked"),
    ("transformer.layer.0.rel_attn.q", (8, 2, 4), "float32", "3-D parameter (8x2x4) of unknown layout"),
    ("model.embed_tokens.weight", (40, 8), "float32", "token embedding"),
    ("transformer.wte.weight", (40, 8), "float32", "token embedding"),
    ("shared.weight", (40, 8), "float32", "token embedding"),
    ("backbone.embeddings.weight", (40, 8), "float32", "token embedding"),
    ("tok_embeddings.weight", (40, 8), "float32", "token embedding"),
    ("bert.embeddings.token_type_embeddings.weight", (2, 8), "float32", "token-type embedding"),
    ("speaker_embedding.weight", (5, 8), "float32", "embedding"),
    ("vit.embeddings.patch_embeddings.projection.weight", (8, 3, 4, 4), "float32", "patch embedding"),
    ("patch_embed.proj.weight", (8, 3, 4, 4), "float32", "patch embedding"),
    ("vit.embeddings.position_embeddings", (1, 9, 8), "float32", "position table"),
    ("pos_embed", (1, 9, 8), "float32", "position table"),
    ("transformer.wpe.weight", (12, 8), "float32", "position table"),
    ("model.decoder.embed_positions.weight", (12, 8), "float32", "position table"),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4), "float32", "position table"),
    ("cls_token", (1, 1, 8), "float32", "a vector stored as a 3-D tensor"),
    ("reg_token", (1, 4, 8), "float32", "learned tokens"),
    ("lm_head.weight", (40, 8), "float32", "language-model head"),
    ("embed_out.weight", (40, 8), "float32", "language-model head"),
    ("cls.predictions.decoder.weight", (40, 8), "float32", "language-model head"),
    ("output_projection.weight", (40, 8), "float32", "language-model head"),
    ("output.weight", (40, 8), "float32", "language-model head"),
    ("score.weight", (2, 8), "float32", "output head"),
    ("classifier.weight", (2, 8), "float32", "output head"),
    ("head.weight", (10, 8), "float32", "output head"),
    ("model.layers.0.block_sparse_moe.router.weight", (4, 8), "float32", "router"),
    ("model.layers.0.mlp.shared_expert_gate.weight", (1, 8), "float32", "router"),
    ("backbone.layers.0.mixer.A_log", (16, 4), "float32", "state-space parameter"),
    ("backbone.layers.0.mixer.conv1d.weight", (16, 1, 4), "float32", "depthwise convolution"),
    ("model.layers.0.input_layernorm.weight", (8,), "float32", "1-D (norm or bias)"),
    ("model.layers.0.self_attn.q_norm.weight", (4, 8), "float32", "normalisation scale stored as a matrix"),
    ("logit_scale", (), "float32", "scalar"),
    ("net.0.weight", (0, 4), "float32", "empty tensor"),
    ("transformer.h.0.attn.bias", (1, 1, 12, 12), "uint8", "integer buffer (uint8)"),
    ("transformer.h.0.attn.bias", (1, 1, 12, 12), "bool", "boolean mask or buffer"),
    ("transformer.h.0.attn.bias", (1, 1, 12, 12), "float32", "bias stored as a matrix"),
    ("bert.embeddings.position_ids", (1, 12), "int64", "index buffer"),
    ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,), "float32", "rotary frequencies"),
    ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 32), "float32", "bias stored as a matrix"),
    ("model.layers.0.mlp.gamma", (4, 8), "float32", "scale stored as a matrix"),
    ("freqs", (4, 8), "complex64", "rotary frequencies"),
    ("mixer.weight", (4, 8), "complex64", "complex values (complex64)"),
    ("q.lora_A.weight", (2, 8), "float32", "LoRA factor"),
    ("q.lora_B.default.weight", (8, 2), "float32", "LoRA factor"),
    ("fc.weight_g", (8, 1), "float32", "part of a parametrised weight"),
    ("fc.weight_v", (8, 8), "float32", "part of a parametrised weight"),
    ("fc.parametrizations.weight.original0", (8, 8), "float32", "part of a parametrised weight"),
    ("layers.0.fc.qweight", (8, 8), "int32", "codes of quantised weights"),
    ("layers.0.fc.qzeros", (1, 8), "int32", "scale or zero point"),
    ("layers.0.fc.scales", (1, 8), "float16", "scale or zero point"),
    ("layers.0.fc.weight", (8, 8), "int8", "codes of quantised weights that could not be de-quantised (int8)"),
    ("layers.0.fc.SCB", (8,), "float32", "scale or zero point"),
    ("layers.0.fc.weight.absmax", (8,), "float32", "scale or zero point"),
    ("layers.0.fc.weight.quant_state.bitsandbytes__nf4", (80,), "uint8", "scale or zero point"),
    ("layers.0.fc.weight_scale_inv", (2, 2), "float32", "scale or zero point"),
    ("layers.0.mlp.experts.gate_up_proj_blocks", (4, 32, 2, 16), "uint8", "codes of quantised weights"),
    ("layers.0.mlp.experts.gate_up_proj_scales", (4, 32, 2), "uint8", "scale or zero point"),
    ("layers.0.fc.scale", (8, 8), "float8_e8m0fnu", "float8_e8m0fnu: scale or packed codes"),
]


@pytest.mark.parametrize(("name", "shape", "dtype", "reason"), SKIPPED)
def test_skipped_with_its_reason(
    name: str, shape: tuple[int, ...], dtype: str, reason: str, catalogue: Catalogue
) -> None:
    selection = select_modules(catalogue({name: (shape, dtype)}))
    assert not selection.modules
    (tensor,) = selection.skipped
    assert (tensor.name, tensor.shape, tensor.dtype) == (name, shape, dtype)
    assert tensor.reason.startswith(reason)
    # What decisions rest on agrees with what people read.
    assert (tensor.kind is SkipKind.SEVERAL_MATRICES) == reason.startswith(("fused: ", "stacked: "))
    assert (tensor.kind is SkipKind.VECTOR) == reason.startswith("1-D")
    assert (tensor.kind is SkipKind.OTHER) == reason.startswith("complex values")


QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
SPLIT: list[tuple[str, tuple[int, ...], str, tuple[str, ...], tuple[int, ...]]] = [
    # name, shape, where the parts are named, their roles, their shape: those that need no configuration
    ("transformer.h.0.attn.c_attn.weight", (8, 24), "transformer.h.0.attn", QKV, (8, 8)),
    ("model.layers.0.self_attn.qkv_proj.weight", (24, 8), "model.layers.0.self_attn", QKV, (8, 8)),
    ("transformer.blocks.0.attn.Wqkv.weight", (24, 8), "transformer.blocks.0.attn", QKV, (8, 8)),
    ("blocks.0.attn.qkv.weight", (24, 8), "blocks.0.attn", QKV, (8, 8)),
    ("model.layers.0.self_attn.W_pack.weight", (24, 8), "model.layers.0.self_attn", QKV, (8, 8)),
    ("visual.resblocks.0.attn.in_proj_weight", (24, 8), "visual.resblocks.0.attn", QKV, (8, 8)),
    ("layers.0.attn.kv_proj.weight", (16, 8), "layers.0.attn", ("k_proj", "v_proj"), (8, 8)),
    ("layers.0.mlp.gate_up_proj.weight", (32, 8), "layers.0.mlp", GATE_UP, (16, 8)),
    ("layers.0.mlp.up_gate_proj.weight", (32, 8), "layers.0.mlp", GATE_UP, (16, 8)),
    ("layers.0.conv.in_proj.weight", (24, 8), "layers.0.conv", ("in_proj_B", "in_proj_C", "in_proj_x"), (8, 8)),
]


@pytest.mark.parametrize(("name", "shape", "parent", "roles", "part"), SPLIT)
def test_fused_tensors_are_several_modules(
    name: str, shape: tuple[int, ...], parent: str, roles: tuple[str, ...], part: tuple[int, ...], catalogue: Catalogue
) -> None:
    selection = select_modules(catalogue({name: shape}))
    assert not selection.skipped
    assert sorted((module.name, module.role) for module in selection.modules) == sorted(
        (f"{parent}.{role}", role) for role in roles
    )
    for module in selection.modules:
        assert (module.parameter, module.stored_shape, module.shape) == (name, shape, part)


@pytest.mark.parametrize(
    ("up", "up_shape", "down", "down_shape"),
    [
        # transformers' usual way round, that of Llama 4, and GraniteMoE's names
        ("experts.gate_up_proj", (4, 32, 8), "experts.down_proj", (4, 8, 16)),
        ("experts.gate_up_proj", (4, 8, 32), "experts.down_proj", (4, 16, 8)),
        ("input_linear.weight", (4, 32, 8), "output_linear.weight", (4, 8, 16)),
    ],
)
def test_stacked_experts_are_told_apart(
    up: str, up_shape: tuple[int, ...], down: str, down_shape: tuple[int, ...], catalogue: Catalogue
) -> None:
    tensors = {f"layers.0.mlp.{up}": up_shape, f"layers.0.mlp.{down}": down_shape}
    modules = select_modules(catalogue(tensors)).modules
    assert [(module.name, module.expert) for module in modules] == [
        (f"layers.0.mlp.experts.{expert}.{role}", expert) for expert in range(4) for role in (*GATE_UP, "down_proj")
    ]
    half = tuple(size // 2 if size == 32 else size for size in up_shape[1:])
    assert [module.shape for module in modules] == 4 * [half, half, down_shape[1:]]


def test_split_names_give_way_to_names_that_are_taken(catalogue: Catalogue) -> None:
    tensors = {"layers.0.attn.qkv.weight": (24, 8), "layers.0.attn.q_proj.weight": (8, 8)}
    names = {module.name for module in select_modules(catalogue(tensors)).modules}
    assert names == {"layers.0.attn.q_proj"} | {f"layers.0.attn.qkv.{role}" for role in QKV}


def test_fused_tensors_can_be_kept_whole(catalogue: Catalogue) -> None:
    tensors = {"h.0.attn.c_attn.weight": (8, 24), "h.0.mlp.experts.gate_up_proj": (2, 32, 8)}
    modules = select_modules(catalogue(tensors), split_fused=False).modules
    assert [(module.name, module.role, module.shape) for module in modules] == [
        ("h.0.attn.c_attn", "c_attn", (8, 24)),
        ("h.0.mlp.experts.0.gate_up_proj", "gate_up_proj", (32, 8)),
        ("h.0.mlp.experts.1.gate_up_proj", "gate_up_proj", (32, 8)),
    ]


def test_include_and_exclude_choose_among_the_parts_of_a_tensor(catalogue: Catalogue) -> None:
    tensors = {"h.0.attn.c_attn.weight": (8, 24), "h.0.mlp.c_fc.weight": (8, 32)}
    chosen = select_modules(catalogue(tensors), include=["attn"], exclude=[r"k_proj$"])
    assert [module.name for module in chosen.modules] == ["h.0.attn.q_proj", "h.0.attn.v_proj"]
    assert {tensor.name: tensor.reason for tensor in chosen.skipped} == {
        "h.0.attn.k_proj": "excluded by --exclude 'k_proj$'",
        "h.0.mlp.c_fc.weight": "not matched by --include",
    }


SCORED: list[tuple[str, tuple[int, ...], str, int | None]] = [
    ("transformer.h.2.attn.c_proj.weight", (8, 8), "o_proj", 2),
    ("transformer.h.2.mlp.c_fc.weight", (8, 32), "up_proj", 2),
    ("transformer.h.2.mlp.c_proj.weight", (32, 8), "down_proj", 2),
    ("transformer.h.2.crossattention.q_attn.weight", (8, 8), "cross_q_proj", 2),
    ("vit.encoder.layer.1.attention.attention.query.weight", (8, 8), "q_proj", 1),
    ("vit.encoder.layer.1.attention.output.dense.weight", (8, 8), "o_proj", 1),
    ("vit.encoder.layer.1.intermediate.dense.weight", (16, 8), "up_proj", 1),
    ("vit.encoder.layer.1.output.dense.weight", (8, 16), "down_proj", 1),
    ("blocks.3.attn.proj.weight", (8, 8), "o_proj", 3),
    ("blocks.3.mlp.fc1.weight", (16, 8), "up_proj", 3),
    ("blocks.3.mlp.fc2.weight", (8, 16), "down_proj", 3),
    ("model.encoder.layers.0.fc1.weight", (16, 8), "up_proj", 0),
    ("fc1.weight", (16, 8), "fc1", None),
    ("model.decoder.layers.0.encoder_attn.out_proj.weight", (8, 8), "cross_o_proj", 0),
    ("layers.0.attention.wq.weight", (8, 8), "q_proj", 0),
    ("layers.0.attention.wo.weight", (8, 8), "o_proj", 0),
    ("model.layers.0.self_attn.q_a_proj.weight", (4, 8), "q_a_proj", 0),
    ("model.layers.0.self_attn.q_b_proj.weight", (16, 4), "q_b_proj", 0),
    ("text_projection.weight", (8, 8), "text_projection", None),
    ("classifier.3.weight", (8, 8), "linear", None),
    ("conv1.weight", (8, 4, 3), "conv1", None),
    ("layers.0.dense.kernel", (8, 8), "kernel", 0),
    ("q.base_layer.weight", (8, 8), "q", None),
    ("model.layers.0.self_attn.q_proj.base_layer.weight", (8, 8), "q_proj", 0),
    ("probe.out.weight", (1, 8), "out", None),
    ("attn.W_q.weight", (8, 8), "q_proj", None),
]


@pytest.mark.parametrize(("name", "shape", "role", "layer"), SCORED)
def test_scored_with_its_role(
    name: str, shape: tuple[int, ...], role: str, layer: int | None, catalogue: Catalogue
) -> None:
    (module,) = select_modules(catalogue({name: shape})).modules
    assert (module.role, module.layer, module.shape) == (role, layer, shape)
    assert module.name == name.removesuffix(".weight")
    assert module.kind == ("linear" if len(shape) == 2 else "conv")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_every_plain_float_storage_is_scored(dtype: str, catalogue: Catalogue) -> None:
    (module,) = select_modules(catalogue({"layers.0.q_proj.weight": ((8, 8), dtype)})).modules
    assert module.dtype == dtype


@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale", "scale_weight", "weight.scale"])
def test_a_weight_with_a_scale_beside_it_is_not_a_weight_yet(scale: str, catalogue: Catalogue) -> None:
    name = "module.layers.0.q_proj.weight"
    beside = f"module.layers.0.q_proj.{scale}"
    tensors = {name: ((8, 8), "float8_e4m3fn"), beside: (1, 1), "module.layers.0.k_proj.weight": (8, 8)}
    selection = select_modules(catalogue(tensors))
    assert [module.role for module in selection.modules] == ["k_proj"]
    assert f"separate scale ({beside})" in _reason(selection, name)
    with pytest.raises(UsageError, match=r"q_proj\.weight: float8_e4m3fn values with a separate scale"):
        select_modules(catalogue(tensors), include=["q_proj.weight$"])


def test_the_quantisation_method_is_named(catalogue: Catalogue) -> None:
    config = {"quantization_config": {"quant_method": "bitnet"}}
    selection = select_modules(catalogue({"fc.weight": ((8, 8), "uint8")}), config=config)
    assert _reason(selection, "fc.weight").endswith("(bitnet, uint8)")


@pytest.mark.parametrize(
    ("tensors", "fused"),
    [
        # ChatGLM and fracast: the up projection is twice as wide as down's input.
        ({"h.0.mlp.dense_h_to_4h.weight": (32, 8), "h.0.mlp.dense_4h_to_h.weight": (8, 16)}, {"dense_h_to_4h"}),
        ({"x.ffns.0.up.weight": (32, 8), "x.ffns.0.down.weight": (8, 16)}, {"up"}),
        ({"layers.0.mlp.Wi.weight": (32, 8), "layers.0.mlp.Wo.weight": (8, 16)}, {"Wi"}),
        # An ordinary MLP, stored either way, also where hidden and intermediate widths are 2 to 1.
        ({"h.0.mlp.c_fc.weight": (8, 32), "h.0.mlp.c_proj.weight": (32, 8)}, set()),
        ({"h.0.mlp.c_fc.weight": (32, 8), "h.0.mlp.c_proj.weight": (8, 32)}, set()),
        ({"h.0.mlp.c_fc.weight": (8, 16), "h.0.mlp.c_proj.weight": (16, 8)}, set()),
        ({"h.0.mlp.c_fc.weight": (8, 4), "h.0.mlp.c_proj.weight": (4, 8)}, set()),
        # Qwen3-Next: query and output gate; grouped queries change nothing for an ordinary one.
        ({"layers.0.self_attn.q_proj.weight": (32, 8), "layers.0.self_attn.o_proj.weight": (8, 16)}, {"q_proj"}),
        ({"layers.0.self_attn.q_proj.weight": (16, 8), "layers.0.self_attn.o_proj.weight": (8, 16)}, set()),
        # Multi-head latent attention: wider query heads are no gate.
        (
            {
                "layers.0.self_attn.q_proj.weight": (32, 8),
                "layers.0.self_attn.kv_b_proj.weight": (16, 4),
                "layers.0.self_attn.o_proj.weight": (8, 16),
            },
            {"kv_b_proj"},
        ),
    ],
)
def test_widths_tell_fused_projections(
    tensors: Mapping[str, tuple[int, ...]], fused: set[str], catalogue: Catalogue
) -> None:
    selection = select_modules(catalogue(tensors), config={"num_attention_heads": 2})
    split = {module.parameter for module in selection.modules if module.view is not None}
    unsplit = {tensor.name for tensor in selection.skipped}
    assert all(tensor.reason.startswith("fused: ") for tensor in selection.skipped)
    assert {name.split(".")[-2] for name in split | unsplit} == fused


def test_experts_in_files_are_ordinary_matrices(catalogue: Catalogue) -> None:
    prefix = "model.layers.1.block_sparse_moe"
    tensors = {f"{prefix}.gate.weight": (4, 8)}
    for expert in (0, 2, 10):
        shapes = {"w1": (16, 8), "w2": (8, 16), "w3": (16, 8)}
        tensors |= {f"{prefix}.experts.{expert}.{leaf}.weight": shape for leaf, shape in shapes.items()}
    selection = select_modules(catalogue(tensors))
    assert _reason(selection, f"{prefix}.gate.weight") == "router"
    order = [(expert, role) for expert in (0, 2, 10) for role in ("gate_proj", "up_proj", "down_proj")]
    assert [(int(module.name.split(".")[-2]), module.role) for module in selection.modules] == order
    leaves = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    assert all(module.name.endswith(leaves[module.role]) for module in selection.modules)
    assert {module.layer for module in selection.modules} == {1}


def test_a_gate_without_experts_is_part_of_the_mlp(catalogue: Catalogue) -> None:
    tensors = {f"layers.0.mlp.{leaf}.weight": (8, 8) for leaf in ("down", "up", "gate")}
    assert [m.role for m in select_modules(catalogue(tensors)).modules] == ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("tensors", "roles"),
    [
        (
            {
                "transformer.h.0.mlp.w1.weight": (16, 8),
                "transformer.h.0.mlp.w2.weight": (16, 8),
                "transformer.h.0.mlp.c_proj.weight": (8, 16),
            },
            {"w1": "up_proj", "w2": "gate_proj", "c_proj": "down_proj"},
        ),
        (
            {
                "model.transformer.blocks.0.att_proj.weight": (24, 8),
                "model.transformer.blocks.0.attn_out.weight": (8, 8),
                "model.transformer.blocks.0.ff_proj.weight": (32, 8),
                "model.transformer.blocks.0.ff_out.weight": (8, 16),
                "model.transformer.ff_out.weight": (40, 8),
            },
            {role: role for role in (*QKV, *GATE_UP)} | {"attn_out": "o_proj", "ff_out": "down_proj"},
        ),
        (
            {
                "rwkv.blocks.0.attention.receptance.weight": (8, 8),
                "rwkv.blocks.0.attention.key.weight": (8, 8),
                "rwkv.blocks.0.feed_forward.value.weight": (8, 32),
            },
            {"receptance": "receptance", "key": "k_proj", "value": "down_proj"},
        ),
    ],
)
def test_families_are_recognised_by_their_names_alone(
    tensors: Mapping[str, tuple[int, ...]], roles: Mapping[str, str], catalogue: Catalogue
) -> None:
    modules = select_modules(catalogue(tensors)).modules
    assert {module.name.rpartition(".")[2]: module.role for module in modules} == roles


@pytest.mark.parametrize("config", [{"model_type": "qwen"}, {"text_config": {"model_type": "qwen"}}])
def test_a_family_is_recognised_by_its_configuration(config: dict[str, Any], catalogue: Catalogue) -> None:
    tensors = catalogue({"blocks.0.mlp.w2.weight": (16, 8), "blocks.0.mlp.w1.weight": (16, 8)})
    assert _roles(select_modules(tensors, config=config))["blocks.0.mlp.w2.weight"] == "gate_proj"
    assert _roles(select_modules(tensors))["blocks.0.mlp.w2.weight"] == "down_proj"


LLAMA = {
    "model.embed_tokens.weight": (40, 8),
    **{f"model.layers.{i}.self_attn.{p}_proj.weight": (8, 8) for i in range(2) for p in "qkvo"},
    **{f"model.layers.{i}.self_attn.q_proj.bias": (8,) for i in range(2)},
    "model.layers.0.mlp.gate_up_proj.weight": (32, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (40, 8),
}


def test_a_head_of_the_embedding_s_shape_is_noted(catalogue: Catalogue) -> None:
    selection = select_modules(catalogue(LLAMA))
    expected = "language-model head; same shape as model.embed_tokens.weight, perhaps a tied copy"
    assert _reason(selection, "lm_head.weight") == expected
    other = select_modules(catalogue(LLAMA | {"lm_head.weight": (41, 8)}))
    assert _reason(other, "lm_head.weight") == "language-model head"


def test_include_restricts(catalogue: Catalogue) -> None:
    selection = select_modules(catalogue(LLAMA), include=["q_proj"])
    assert _roles(selection) == {f"model.layers.{i}.self_attn.q_proj.weight": "q_proj" for i in range(2)}
    assert _reason(selection, "model.layers.0.self_attn.k_proj.weight") == "not matched by --include"
    assert _reason(selection, "model.embed_tokens.weight") == "not matched by --include"
    # A bias that the pattern happens to match is no error, but keeps its own reason.
    assert _reason(selection, "model.layers.0.self_attn.q_proj.bias") == "1-D (norm or bias)"
    assert len(selection.modules) + len(selection.skipped) == len(LLAMA)


@pytest.mark.parametrize(
    ("include", "name", "role"),
    [
        ("embed_tokens", "model.embed_tokens.weight", "embed_tokens"),
        ("^lm_head", "lm_head.weight", "lm_head"),
    ],
)
def test_include_brings_in_what_is_left_out(include: str, name: str, role: str, catalogue: Catalogue) -> None:
    selection = select_modules(catalogue(LLAMA), include=[include, "layers.1.*v_proj"])
    assert _roles(selection) == {name: role, "model.layers.1.self_attn.v_proj.weight": "v_proj"}


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "stem.depthwise.weight"])
def test_include_brings_in_a_convolution(name: str, catalogue: Catalogue) -> None:
    shape = (8, 1, 3, 3) if "depthwise" in name else (8, 3, 4, 4)
    (module,) = select_modules(catalogue({name: shape}), include=["."]).modules
    assert (module.kind, module.num_matrices) == ("conv", shape[2] * shape[3])


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "reason"),
    [
        ("model.norm.weight", (8,), "float32", "1-D"),
        ("fc.qweight", (8, 8), "int32", "codes of quantised weights"),
        ("fc.weight", (8, 8), "int8", "codes of quantised weights"),
        ("fc.scales", (8, 8), "float16", "scale or zero point"),
        ("mlp.experts.down_proj_bias", (4, 8), "float32", "bias"),
        ("fc.lora_A.weight", (4, 8), "float32", "LoRA"),
        ("some.table", (4, 8, 2), "float32", "3-D parameter"),
        ("pos_embed", (1, 9, 8), "float32", "position table"),
    ],
)
def test_include_of_what_cannot_be_scored_is_an_error(
    name: str, shape: tuple[int, ...], dtype: str, reason: str, catalogue: Catalogue
) -> None:
    message = f"--include '{re.escape(name)}' matches no tensor that can be scored; {name}: {reason}"
    with pytest.raises(UsageError) as caught:
        select_modules(catalogue(LLAMA | {name: (shape, dtype)}), include=[re.escape(name), "q_proj"])
    assert message.replace("\\", "\\\\") in str(caught.value)


def test_exclude_removes_and_prevails(catalogue: Catalogue) -> None:
    selection = select_modules(catalogue(LLAMA), exclude=[r"layers\.0\.", "norm"])
    assert {module.layer for module in selection.modules} == {1}
    assert _reason(selection, "model.layers.0.self_attn.q_proj.weight") == r"excluded by --exclude 'layers\\.0\\.'"
    assert _reason(selection, "model.norm.weight") == "1-D (norm or bias)"
    both = select_modules(catalogue(LLAMA), include=["q_proj"], exclude=[r"layers\.0\."])
    assert list(_roles(both)) == ["model.layers.1.self_attn.q_proj.weight"]


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("query", r"'query' matches no tensor name; names look like: (\S+weight, ){2}\S+weight$"),
        ("q_proj(", r"'q_proj\(' is not a regular expression: .* at position 6$"),
    ],
)
def test_bad_expressions_are_usage_errors(option: str, pattern: str, message: str, catalogue: Catalogue) -> None:
    with pytest.raises(UsageError, match=f"^--{option} {message}") as caught:
        select_modules(catalogue(LLAMA), **{option: ["q_proj", pattern]})
    assert "\n" not in str(caught.value)


def test_a_name_given_twice_is_rejected(catalogue: Catalogue) -> None:
    with pytest.raises(ValueError, match=r"two tensors are named 'fc\.weight'"):
        select_modules(catalogue({"fc.weight": (2, 2)}) * 2)


def test_nothing_in_nothing_out() -> None:
    assert select_modules([]) == Selection(modules=(), skipped=())


_SEGMENTS = st.sampled_from(
    [
        "model",
        "encoder",
        "decoder",
        "layers",
        "h",
        "0",
        "2",
        "10",
        "attn",
        "mlp",
        "experts",
        "q_proj",
        "fc1",
        "gate",
        "w1",
        "weight_ih_l0",
        "weight_hh_l0",
    ]
)
_NAMES = st.lists(_SEGMENTS, min_size=1, max_size=6).map(".".join)
_TENSORS = st.dictionaries(
    st.tuples(_NAMES, st.sampled_from(["", ".weight", ".bias", ".weight_scale", ".lora_A.weight"])).map("".join),
    st.tuples(
        st.lists(st.integers(0, 9), max_size=6).map(tuple),
        st.sampled_from(["float32", "bfloat16", "float8_e4m3fn", "int8", "bool", "complex64"]),
    ),
    max_size=12,
)


@given(_TENSORS, st.randoms(use_true_random=False))
def test_any_tensors_land_exactly_once_whatever_their_order(
    tensors: dict[str, tuple[tuple[int, ...], str]], random: Any
) -> None:
    infos = [TensorInfo(name=name, shape=shape, dtype=dtype, file="") for name, (shape, dtype) in tensors.items()]
    selection = select_modules(infos)
    names = [*{module.parameter for module in selection.modules}, *(tensor.name for tensor in selection.skipped)]
    assert sorted(names) == sorted(tensors)
    assert len({module.name for module in selection.modules}) == len(selection.modules)
    assert all(len(m.shape) >= 2 and min(m.shape) > 0 and "float" in m.dtype for m in selection.modules)
    assert all(tensor.reason for tensor in selection.skipped)
    random.shuffle(infos)
    assert select_modules(infos) == selection
