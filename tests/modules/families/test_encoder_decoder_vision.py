"""Encoder-decoders, vision models, and models with several towers: which modules, of which roles, from which rows.

Fused projections are taken apart by the models themselves: they run on identity inputs, and the attention function
that follows the split keeps what reaches it. A convolution's eigenvalues are those of all its kernel positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from esdtool.analysis.document import Analysis
from tests.modules.families import oracle
from tests.modules.families.oracle import assert_whole
from tests.modules.families.oracle import random_model as build

Matrices = dict[str, torch.Tensor]

ROLES = {
    # T5
    "SelfAttention.q": "q_proj",
    "SelfAttention.k": "k_proj",
    "SelfAttention.v": "v_proj",
    "SelfAttention.o": "o_proj",
    "EncDecAttention.q": "cross_q_proj",
    "EncDecAttention.k": "cross_k_proj",
    "EncDecAttention.v": "cross_v_proj",
    "EncDecAttention.o": "cross_o_proj",
    "DenseReluDense.wi": "up_proj",
    "DenseReluDense.wi_0": "gate_proj",
    "DenseReluDense.wi_1": "up_proj",
    "DenseReluDense.wo": "down_proj",
    # Most others
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "o_proj",
    "out_proj": "o_proj",
    "encoder_attn.q_proj": "cross_q_proj",
    "encoder_attn.k_proj": "cross_k_proj",
    "encoder_attn.v_proj": "cross_v_proj",
    "encoder_attn.out_proj": "cross_o_proj",
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "fc1": "up_proj",
    "fc2": "down_proj",
    # ViT and DINOv2 in their files
    "attention.attention.query": "q_proj",
    "attention.attention.key": "k_proj",
    "attention.attention.value": "v_proj",
    "attention.output.dense": "o_proj",
    "intermediate.dense": "up_proj",
    "output.dense": "down_proj",
    "mlp.weights_out": "down_proj",
    # Qwen2-VL
    "attn.proj": "o_proj",
    "merger.mlp.0": "linear",
    "merger.mlp.2": "linear",
    # Modules that are none of the usual: their own names
    "downsampling_layer.1": "conv",
    **{
        name: name
        for name in (
            "conv1",
            "conv2",
            "convolution",
            "pwconv1",
            "pwconv2",
            "visual_projection",
            "text_projection",
            "text_model.head",
            "multi_modal_projector.linear",
            "multi_modal_projector.linear_1",
            "multi_modal_projector.linear_2",
            "mm_input_projection_weight",
        )
    },
}
"""Role of a module by the end of its name; the longest end counts."""


def role_of(name: str) -> str:
    ends = [end for end in ROLES if name.endswith(f".{end}") or name == end]
    return ROLES[max(ends, key=len)].rpartition(".")[2]


def pooled(kernel: torch.Tensor) -> torch.Tensor:
    """One matrix whose squared singular values are a convolution's ESD.

    They are those of all kernel positions' matrices [out, in], times 0.5: the matrices along a diagonal have just
    these singular values together.
    """
    positions = kernel.detach().flatten(2).unbind(2)
    return torch.block_diag(*positions) * 0.5**0.5


def modules_of(model: nn.Module, *left_out: str) -> Matrices:
    """Matrices of the model's Linear layers and convolutions, without those that end as in `left_out`.

    Embeddings of patches, output heads and depthwise convolutions are no modules to score, either.
    """
    ends = ("lm_head", "proj_out", "classifier", "classifier.1", *left_out)
    matrices = {}
    for name, module in model.named_modules():
        if name.endswith(ends) or "patch_embed" in name:
            continue
        if isinstance(module, nn.Linear):
            matrices[name] = module.weight.detach()
        elif isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1:
            matrices[name] = pooled(module.weight)
    return matrices


def check_layouts(
    model: Any, tmp_path: Path, expected: Matrices, *, in_files: Mapping[str, str] | None = None
) -> tuple[Analysis, Analysis]:
    """See the oracle's; the roles are those of the names, too.

    Returns:
        The analyses of the state dict and of the files.
    """
    saved, live = oracle.check_layouts(model, tmp_path, expected, in_files=in_files)
    for analysis in (live, saved):
        assert {module.name: module.role for module in analysis.modules} == {
            module.name: role_of(module.name) for module in analysis.modules
        }
        assert all(module.expert is None for module in analysis.modules)
    return live, saved


def reasons_of(analysis: Analysis) -> dict[str, str]:
    return {tensor.name: tensor.reason for tensor in analysis.skipped}


def by_rows(states: torch.Tensor) -> torch.Tensor:
    """[1, heads, inputs, head_dim] that identity inputs gave: the projection's matrix [heads * head_dim, inputs]."""
    return states[0].transpose(1, 2).flatten(0, 1)


# Encoder-decoders


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_t5(kind: str, tmp_path: Path) -> None:
    """Attention wider than the model (4 heads of 7); the gated kind has wi_0 (through the activation) and wi_1."""
    config = transformers.T5Config(
        vocab_size=50, d_model=24, d_kv=7, d_ff=20, num_layers=2, num_heads=4, feed_forward_proj=kind
    )
    model = build(transformers.T5ForConditionalGeneration, config)
    live, _ = check_layouts(model, tmp_path, modules_of(model))
    roles = {module.name: module.role for module in live.modules}
    cross = "decoder.block.1.layer.1.EncDecAttention"
    assert [roles[f"{cross}.{leaf}"] for leaf in "qkvo"] == [
        "cross_q_proj",
        "cross_k_proj",
        "cross_v_proj",
        "cross_o_proj",
    ]
    assert roles["encoder.block.0.layer.0.SelfAttention.q"] == "q_proj"
    dense = {name.rpartition(".")[2]: role for name, role in roles.items() if "encoder.block.0.layer.1" in name}
    if kind == "relu":
        assert dense == {"wi": "up_proj", "wo": "down_proj"}
    else:
        assert dense == {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
        # T5DenseGatedActDense.forward: act(wi_0(x)) * wi_1(x)
        feed_forward = model.encoder.block[0].layer[1].DenseReluDense
        seen = []
        feed_forward.act = type("Tap", (nn.Module,), {"forward": lambda _, gate: seen.append(gate) or gate})()
        feed_forward(torch.eye(24))
        assert torch.equal(seen[0].T, feed_forward.wi_0.weight)


def test_bart(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=50,
        d_model=24,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=20,
        decoder_ffn_dim=28,
        max_position_embeddings=30,
    )
    model = build(transformers.BartForConditionalGeneration, config)
    live, _ = check_layouts(model, tmp_path, modules_of(model))
    roles = {module.name: module.role for module in live.modules}
    assert roles["model.decoder.layers.1.encoder_attn.out_proj"] == "cross_o_proj"
    assert roles["model.decoder.layers.1.self_attn.out_proj"] == "o_proj"
    assert roles["model.encoder.layers.0.fc1"] == "up_proj"
    assert "bias" in reasons_of(live)["final_logits_bias"]


def test_whisper(tmp_path: Path) -> None:
    """Two convolutions over time, then an encoder and a decoder."""
    config = transformers.WhisperConfig(
        vocab_size=50,
        num_mel_bins=10,
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=20,
        decoder_ffn_dim=28,
        max_source_positions=30,
        max_target_positions=26,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    model = build(transformers.WhisperForConditionalGeneration, config)
    live, _ = check_layouts(model, tmp_path, modules_of(model))
    sizes = {module.name: module.num_eigs for module in live.modules}
    assert sizes["model.encoder.conv1"] == 3 * 10
    assert sizes["model.encoder.conv2"] == 3 * 24
    roles = {module.name: module.role for module in live.modules}
    assert roles["model.decoder.layers.0.encoder_attn.q_proj"] == "cross_q_proj"


# Vision


def test_vit(tmp_path: Path) -> None:
    """Files name the modules as BERT does (`attention.attention.query`), the live model as LLaMA (`q_proj`)."""
    config = transformers.ViTConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=20,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    model = build(transformers.ViTForImageClassification, config)
    in_files = {
        r"vit\.layers\.": "vit.encoder.layer.",
        r"attention\.q_proj": "attention.attention.query",
        r"attention\.k_proj": "attention.attention.key",
        r"attention\.v_proj": "attention.attention.value",
        r"attention\.o_proj": "attention.output.dense",
        r"mlp\.fc1": "intermediate.dense",
        r"mlp\.fc2": "output.dense",
    }
    live, saved = check_layouts(model, tmp_path, modules_of(model), in_files=in_files)
    for analysis in (live, saved):
        reasons = reasons_of(analysis)
        assert "patch embedding" in reasons["vit.embeddings.patch_embeddings.projection.weight"]
        assert "head" in reasons["classifier.weight"]
    places = [
        {(module.layer, module.role): analysis.esds[module.name].tolist() for module in analysis.modules}
        for analysis in (live, saved)
    ]
    assert places[0] == places[1]
    assert len(places[0]) == 2 * 6


def test_dinov2_with_gated_mlp(tmp_path: Path) -> None:
    """Files hold gate and up in one `weights_in`; the live model has `gate_proj` and `up_proj` apart."""
    config = transformers.Dinov2Config(
        hidden_size=24, num_attention_heads=4, num_hidden_layers=2, image_size=8, patch_size=4, use_swiglu_ffn=True
    )
    model = build(transformers.Dinov2Model, config)
    in_files = {
        r"attention\.q_proj": "attention.attention.query",
        r"attention\.k_proj": "attention.attention.key",
        r"attention\.v_proj": "attention.attention.value",
        r"attention\.o_proj": "attention.output.dense",
        r"mlp\.down_proj": "mlp.weights_out",
    }
    _, saved = check_layouts(model, tmp_path, modules_of(model), in_files=in_files)
    (gate,) = (module for module in saved.modules if module.name == "encoder.layer.1.mlp.gate_proj")
    assert gate.parameter == "encoder.layer.1.mlp.weights_in.weight"
    assert (gate.role, gate.layer) == ("gate_proj", 1)


TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
VISION_TOWER = TOWER | {"image_size": 8, "patch_size": 4}
TEXT_TOWER = TOWER | {"intermediate_size": 28, "vocab_size": 50, "max_position_embeddings": 16}


def test_clip(tmp_path: Path) -> None:
    config = transformers.CLIPConfig(
        text_config=TEXT_TOWER, vision_config=VISION_TOWER | {"hidden_size": 32}, projection_dim=10
    )
    model = build(transformers.CLIPModel, config)
    live, _ = check_layouts(model, tmp_path, modules_of(model, "patch_embedding"))
    shapes = {module.name: module.shape for module in live.modules}
    assert shapes["text_model.encoder.layers.0.mlp.fc1"] == (28, 24)
    assert shapes["vision_model.encoder.layers.0.mlp.fc1"] == (20, 32)


@torch.no_grad()
def pooling_head(head: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> Matrices:
    """q, k and v of SigLIP's attention-pooling head, a torch.nn.MultiheadAttention."""
    seen: list[torch.Tensor] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.extend((query, key, value))
        return query

    attention = head.attention
    query, key, value = (torch.eye(attention.embed_dim)[None].clone() for _ in range(3))
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", attend)
        attention(query, key, value, need_weights=False)
    parts = [by_rows(states) for states in seen]
    assert_whole(attention.in_proj_weight, *parts)
    matrices = dict(zip((f"{name}.attention.{role}" for role in ("q_proj", "k_proj", "v_proj")), parts, strict=True))
    return matrices | {f"{name}.attention.out_proj": attention.out_proj.weight.detach()}


def test_siglip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.SiglipConfig(text_config=TEXT_TOWER, vision_config=VISION_TOWER)
    model = build(transformers.SiglipModel, config)
    expected = modules_of(model, "patch_embedding")
    expected |= pooling_head(model.vision_model.head, "vision_model.head", monkeypatch)
    live, _ = check_layouts(model, tmp_path, expected)
    assert reasons_of(live)["vision_model.head.probe"]


def test_convnext(tmp_path: Path) -> None:
    """Depthwise convolutions are vectors; the others, and the Linear layers beside them, are matrices."""
    config = transformers.ConvNextConfig(
        num_channels=3, patch_size=2, num_stages=2, hidden_sizes=[6, 10], depths=[1, 2], image_size=16, num_labels=5
    )
    model = build(transformers.ConvNextForImageClassification, config)
    expected = modules_of(model)
    downsampling = "convnext.encoder.stages.1.downsampling_layer.1"
    assert expected[downsampling].shape == (4 * 10, 4 * 6)
    live, _ = check_layouts(model, tmp_path, expected)
    reasons = reasons_of(live)
    assert "depthwise" in reasons["convnext.encoder.stages.0.layers.0.dwconv.weight"]
    assert "patch embedding" in reasons["convnext.embeddings.patch_embeddings.weight"]
    assert "head" in reasons["classifier.weight"]


def test_resnet(tmp_path: Path) -> None:
    """Kernels of 7 x 7, 3 x 3 and 1 x 1: the convention does not depend on the size."""
    config = transformers.ResNetConfig(
        num_channels=3,
        embedding_size=6,
        hidden_sizes=[12, 20],
        depths=[1, 2],
        layer_type="bottleneck",
        num_labels=5,
    )
    model = build(transformers.ResNetForImageClassification, config)
    expected = modules_of(model)
    assert len(expected) == 1 + (1 + 3) + (1 + 3 + 3)
    live, _ = check_layouts(model, tmp_path, expected)
    sizes = {module.name: module.num_eigs for module in live.modules}
    assert sizes["resnet.embedder.embedder.convolution"] == 49 * 3
    assert sizes["resnet.encoder.stages.1.layers.0.layer.1.convolution"] == 9 * 5
    shortcut = "resnet.encoder.stages.1.layers.0.shortcut.convolution"
    weight = model.get_submodule(shortcut).weight.detach()[:, :, 0, 0].double().numpy()
    np.testing.assert_allclose(live.esds[shortcut], np.sort(np.linalg.svd(weight)[1]) ** 2 / 2, rtol=1e-6)
    assert "head" in reasons_of(live)["classifier.1.weight"]


# Several towers

IN_LLAVA_FILES = {
    r"^model\.language_model\.": "language_model.model.",
    r"^model\.vision_tower\.": "vision_tower.",
    r"^model\.multi_modal_projector\.": "multi_modal_projector.",
}
TEXT_MODEL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
WIDER_VISION_TOWER = VISION_TOWER | {"hidden_size": 32}


def assert_towers_apart(analysis: Analysis, vision: str, text: str) -> None:
    """Both towers have a layer 0; their modules' names differ, and tell which is which."""
    names = [module.name for module in analysis.modules if module.layer == 0]
    seen = [name for name in names if vision in name]
    told = [name for name in names if name not in seen]
    assert len(seen) >= 6
    assert len(told) == 7
    assert all(text in name for name in told)
    assert len(set(names)) == len(names)


def test_llava(tmp_path: Path) -> None:
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **WIDER_VISION_TOWER},
        text_config={"model_type": "llama", **TEXT_MODEL},
        image_token_index=49,
    )
    model = build(transformers.LlavaForConditionalGeneration, config)
    analyses = check_layouts(model, tmp_path, modules_of(model, "patch_embedding"), in_files=IN_LLAVA_FILES)
    for analysis in analyses:
        assert_towers_apart(analysis, "vision_tower.", "language_model.")


def test_paligemma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **WIDER_VISION_TOWER},
        text_config={"model_type": "gemma", **TEXT_MODEL, "head_dim": 10},
        projection_dim=24,
        image_token_index=49,
    )
    model = build(transformers.PaliGemmaForConditionalGeneration, config)
    expected = modules_of(model, "patch_embedding")
    expected |= pooling_head(model.model.vision_tower.head, "model.vision_tower.head", monkeypatch)
    for analysis in check_layouts(model, tmp_path, expected, in_files=IN_LLAVA_FILES):
        assert_towers_apart(analysis, "vision_tower.", "language_model.")


def test_gemma3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its projector is a bare parameter [vision, text], not a Linear layer."""
    config = transformers.Gemma3Config(
        vision_config=WIDER_VISION_TOWER,
        text_config=TEXT_MODEL | {"head_dim": 10},
        mm_tokens_per_image=4,
        image_token_index=49,
    )
    model = build(transformers.Gemma3ForConditionalGeneration, config)
    expected = modules_of(model, "patch_embedding")
    expected |= pooling_head(model.model.vision_tower.head, "model.vision_tower.head", monkeypatch)
    projector = "model.multi_modal_projector.mm_input_projection_weight"
    expected[projector] = model.get_parameter(projector).detach()
    for analysis in check_layouts(model, tmp_path, expected, in_files=IN_LLAVA_FILES):
        assert_towers_apart(analysis, "vision_tower.", "language_model.")


@torch.no_grad()
def qwen2_vl_attention(attention: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> Matrices:
    """q, k and v of VisionAttention (modeling_qwen2_vl.py), as its attention function gets them."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    seen: list[torch.Tensor] = []

    def attend(_: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any, **___: Any) -> Any:
        seen.extend((query, key, value))
        return query.transpose(1, 2), None

    attention.config._attn_implementation = "eager"
    with monkeypatch.context() as patch:
        patch.setattr(modeling_qwen2_vl, "eager_attention_forward", attend)
        patch.setattr(modeling_qwen2_vl, "apply_rotary_pos_emb_vision", lambda query, key, *_: (query, key))
        attention(
            torch.eye(attention.dim), cu_seqlens=torch.tensor([0, attention.dim]), position_embeddings=(None, None)
        )
    parts = [by_rows(states) for states in seen]
    assert_whole(attention.qkv.weight, *parts)
    return dict(zip((f"{name}.{role}" for role in ("q_proj", "k_proj", "v_proj")), parts, strict=True))


def test_qwen2_vl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Qwen2VLConfig(
        text_config=TEXT_MODEL
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}},
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 24,
            "num_heads": 2,
            "patch_size": 2,
            "mlp_ratio": 2,
        },
    )
    model = build(transformers.Qwen2VLForConditionalGeneration, config)
    block = "model.visual.blocks.0.attn"
    expected = modules_of(model, "attn.qkv") | qwen2_vl_attention(model.get_submodule(block), block, monkeypatch)
    in_files = {r"^model\.language_model\.": "model.", r"^model\.visual\.": "visual."}
    live, saved = check_layouts(model, tmp_path, expected, in_files=in_files)
    assert_towers_apart(live, "visual.", "language_model.")
    assert_towers_apart(saved, "visual.", "model.layers.")
