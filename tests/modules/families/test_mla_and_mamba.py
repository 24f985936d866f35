"""Multi-head latent attention, state-space mixers and gated short convolutions: what lies in their wide projections.

The expected matrices are what the model's own forward makes of identity inputs: the functions that follow the split
(convolution, scan, rotation, normalisation) are replaced by ones that keep what reaches them.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import esdtool
from esdtool.analysis.document import Analysis
from tests.modules.families import oracle
from tests.modules.families.oracle import assert_whole, random_model

Matrices = dict[str, torch.Tensor]

HIDDEN = 24
COMMON: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SSM_SIZES: dict[str, Any] = {
    "mamba_n_heads": 6,
    "mamba_d_head": 8,
    "mamba_d_state": 5,
    "mamba_d_conv": 3,
    "mamba_chunk_size": 8,
    "intermediate_size": 20,
}

ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "0": "linear", "1": "linear"}
"""Roles of modules whose last segment is none itself."""


build = functools.partial(random_model, zeroed=lambda name: False)


def linears(model: nn.Module, *left_out: str) -> Matrices:
    """Weights of the model's Linear layers, without output head and router, and those that end as in `left_out`."""
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(("lm_head", "router", *left_out))
    }


def experts_of(model: nn.Module) -> Matrices:
    """Projections of the experts, sliced as `DeepseekV3Experts.forward` and its kin do.

    `gate, up = linear(x, gate_up_proj[expert]).chunk(2, dim=-1)`, then `linear(act_fn(gate) * up, down_proj[expert])`.
    """
    matrices = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            for expert in range(module.num_experts):
                gate, up = module.gate_up_proj[expert].detach().chunk(2)
                matrices[f"{name}.{expert}.gate_proj"] = gate
                matrices[f"{name}.{expert}.up_proj"] = up
                matrices[f"{name}.{expert}.down_proj"] = module.down_proj[expert].detach()
    return matrices


def check_layouts(model: Any, tmp_path: Path, expected: Matrices) -> Analysis:
    """See the oracle's; the roles and experts are those of the names, too.

    Returns:
        The analysis of the state dict.
    """
    saved, live = oracle.check_layouts(model, tmp_path, expected)
    for analysis in (saved, live):
        for module in analysis.modules:
            leaf = module.name.rpartition(".")[2]
            role = "o_proj" if module.name.endswith("self_attn.out_proj") else ROLES.get(leaf, leaf)
            assert module.role == role, module.name
            number = re.search(r"\.experts\.(\d+)\.", module.name)
            assert module.expert == (int(number[1]) if number else None), module.name
    return live


# Multi-head latent attention


def deepseek(version: int, *, q_lora_rank: int | None = 13) -> Any:
    """DeepSeek: a dense layer, then one with experts. No two sizes are alike."""
    v2 = version == 2
    config_class = transformers.DeepseekV2Config if v2 else transformers.DeepseekV3Config
    config = config_class(
        **COMMON,
        num_key_value_heads=4,
        intermediate_size=28,
        moe_intermediate_size=20,
        n_routed_experts=3,
        n_shared_experts=2,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        kv_lora_rank=12,
        q_lora_rank=q_lora_rank,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=7,
    )
    return build(transformers.DeepseekV2ForCausalLM if v2 else transformers.DeepseekV3ForCausalLM, config)


@torch.no_grad()
def latent_attention(attention: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> Matrices:
    """The parts of an attention layer of DeepSeek V2 or V3 (DeepseekV2Attention, DeepseekV3Attention).

    Their forward splits `kv_a_proj_with_mqa` into a latent, which goes to `kv_a_layernorm`, and the rotary key, which
    goes to `expand_kv` once it is rotated; `expand_kv` splits the output of `kv_b_proj`, head by head.
    """
    seen: dict[str, torch.Tensor] = {}
    rank, rotary, nope = attention.kv_lora_rank, attention.qk_rope_head_dim, attention.qk_nope_head_dim
    expand = attention.expand_kv

    def expanding(latent: torch.Tensor, rotary_key: torch.Tensor) -> Any:
        seen["rotary key"] = rotary_key
        return expand(latent, rotary_key)

    hook = attention.kv_a_layernorm.register_forward_pre_hook(lambda _, inputs: seen.update(latent=inputs[0]))
    if type(attention).__name__ == "DeepseekV2Attention":
        no_rotation: Any = torch.ones(1, HIDDEN, rotary // 2, dtype=torch.complex64)
    else:
        no_rotation = torch.ones(1, HIDDEN, rotary), torch.zeros(1, HIDDEN, rotary)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "expand_kv", expanding)
        attention(torch.eye(HIDDEN)[None], attention_mask=None, position_embeddings=no_rotation)
    hook.remove()

    keys, values = expand(torch.eye(rank)[None, None], torch.zeros(1, 1, rank, rotary))  # [1, heads, rank, .]
    parts = {
        f"{name}.kv_a_proj": seen["latent"].reshape(HIDDEN, rank).T,
        # V3 puts the even positions before the odd ones when it rotates: rows in another order, nothing else.
        f"{name}.k_pe_proj": seen["rotary key"].reshape(HIDDEN, rotary).T,
        f"{name}.k_b_proj": keys[0, :, :, :nope].transpose(1, 2).flatten(0, 1),
        f"{name}.v_b_proj": values[0].transpose(1, 2).flatten(0, 1),
    }
    down_latent, down_rotary, up_keys, up_values = parts.values()
    assert down_latent.shape == (12, HIDDEN)
    assert down_rotary.shape == (4, HIDDEN)
    assert up_keys.shape == (4 * 6, 12)
    assert up_values.shape == (4 * 7, 12)
    assert_whole(attention.kv_a_proj_with_mqa.weight, down_latent, down_rotary)
    assert_whole(attention.kv_b_proj.weight, up_keys, up_values)
    return parts


def deepseek_matrices(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Matrices:
    matrices = linears(model, "kv_a_proj_with_mqa", "kv_b_proj") | experts_of(model)
    for name, module in model.named_modules():
        if name.endswith(".self_attn"):
            matrices |= latent_attention(module, name, monkeypatch)
    return matrices


@pytest.mark.parametrize("q_lora_rank", [13, None])
@pytest.mark.parametrize("version", [2, 3])
def test_deepseek(version: int, q_lora_rank: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deepseek(version, q_lora_rank=q_lora_rank)
    expected = deepseek_matrices(model, monkeypatch)
    attention = "model.layers.1.self_attn"
    queries = {f"{attention}.q_proj"} if q_lora_rank is None else {f"{attention}.q_a_proj", f"{attention}.q_b_proj"}
    assert {name for name in expected if name.startswith(attention)} == queries | {
        f"{attention}.{part}" for part in ("kv_a_proj", "k_pe_proj", "k_b_proj", "v_b_proj", "o_proj")
    }
    live = check_layouts(model, tmp_path, expected)
    layers = {module.name: module.layer for module in live.modules}
    assert layers[f"{attention}.k_b_proj"] == 1
    (reason,) = (tensor.reason for tensor in live.skipped if tensor.name == "model.layers.1.mlp.gate.weight")
    assert "router" in reason


def test_latent_attention_without_config_is_never_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sizes, what can be told is told, and what cannot is left out: with the remedy."""
    model = deepseek(3)
    expected = deepseek_matrices(model, monkeypatch)
    analysis = esdtool.analyze(dict(model.state_dict()), min_eigs=2, jobs=1)
    names = {module.name for module in analysis.modules}
    assert names <= expected.keys()
    for name in names:
        singular = np.linalg.svd(expected[name].double().numpy(), compute_uv=False)
        np.testing.assert_allclose(np.sqrt(analysis.esds[name]), np.sort(singular), rtol=0, atol=1e-6 * singular.max())
    reasons = {tensor.name: tensor.reason for tensor in analysis.skipped}
    for name, parts in (("kv_a_proj_with_mqa", ("kv_a_proj", "k_pe_proj")), ("kv_b_proj", ("k_b_proj", "v_b_proj"))):
        attention = "model.layers.0.self_attn"
        if not names >= {f"{attention}.{part}" for part in parts}:
            assert "config.json" in reasons[f"{attention}.{name}.weight"]


# State-space mixers


def functions_of(mixer: nn.Module) -> Any:
    """The model's file, where its mixer finds convolution and scan."""
    return sys.modules[type(mixer).__module__]


@torch.no_grad()
def mamba1_parts(mixer: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> Matrices:
    """x and z of a Mamba mixer (MambaMixer, JambaMambaMixer): x goes through the convolution, z gates the scan."""
    seen = {}

    def convolution(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen["x"] = x
        return x

    def scan(x: torch.Tensor, *_: Any, z: torch.Tensor, **__: Any) -> torch.Tensor:
        seen["z"] = z
        return x

    with monkeypatch.context() as patch:
        patch.setattr(functions_of(mixer), "causal_conv1d_fn", convolution)
        patch.setattr(functions_of(mixer), "mamba_selective_scan", scan)
        mixer(torch.eye(HIDDEN)[None])
    parts = {f"{name}.in_proj_{part}": states[0] for part, states in seen.items()}  # [1, inner, inputs]
    assert list(parts) == [f"{name}.in_proj_x", f"{name}.in_proj_z"]
    assert_whole(mixer.in_proj.weight, *parts.values())
    return parts


@torch.no_grad()
def mamba2_parts(mixer: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> Matrices:
    """z, x, B, C and dt of a Mamba-2 mixer (Mamba2Mixer and those made after it).

    Its forward splits `in_proj` into [gate, hidden_states_B_C, dt] and, behind the convolution, the middle into
    [hidden_states, B, C]; the gate z goes to `norm`.
    """
    seen = {}

    def convolution(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x

    def scan(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, **_: Any) -> Any:
        seen.update(x=x, B=B, C=C, dt=dt)
        return x

    hook = mixer.norm.register_forward_pre_hook(lambda _, inputs: seen.update(z=inputs[1]))
    with monkeypatch.context() as patch:
        patch.setattr(functions_of(mixer), "causal_conv1d_fn", convolution)
        patch.setattr(functions_of(mixer), "mamba2_chunk_scan", scan)
        mixer(torch.eye(HIDDEN)[None])
    hook.remove()
    parts = {f"{name}.in_proj_{part}": states.reshape(HIDDEN, -1).T for part, states in seen.items()}
    assert_whole(mixer.in_proj.weight, *parts.values())
    order = torch.cat([parts[f"{name}.in_proj_{part}"] for part in ("z", "x", "B", "C", "dt")])
    torch.testing.assert_close(order, mixer.in_proj.weight, rtol=0, atol=0)
    return parts


def with_mixers(model: nn.Module, parts_of: Callable[..., Matrices], monkeypatch: pytest.MonkeyPatch) -> Matrices:
    matrices = linears(model, "mixer.in_proj", "mamba.in_proj", "gate_up_proj") | experts_of(model)
    for name, module in model.named_modules():
        if name.endswith((".mixer", ".mamba")):
            matrices |= parts_of(module, name, monkeypatch)
    return matrices


def assert_left_out(analysis: Analysis, mixer: str) -> None:
    """Vectors and depthwise kernels of a mixer are skipped, with reasons."""
    reasons = {tensor.name: tensor.reason for tensor in analysis.skipped}
    for tensor in ("conv1d.weight", "A_log", "D"):
        assert reasons[f"{mixer}.{tensor}"]


def mamba() -> Any:
    config = transformers.MambaConfig(
        vocab_size=50, hidden_size=HIDDEN, state_size=5, num_hidden_layers=2, expand=2, conv_kernel=3, time_step_rank=7
    )
    return build(transformers.MambaForCausalLM, config)


def test_mamba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mamba()
    expected = with_mixers(model, mamba1_parts, monkeypatch)
    mixer = "backbone.layers.0.mixer"
    parts = ("in_proj_x", "in_proj_z", "x_proj", "dt_proj", "out_proj")
    assert {name for name in expected if name.startswith(mixer)} == {f"{mixer}.{part}" for part in parts}
    live = check_layouts(model, tmp_path, expected)
    roles = {module.name: module.role for module in live.modules}
    assert {name: roles[f"{mixer}.{name}"] for name in parts} == {name: name for name in parts}
    assert_left_out(live, mixer)


def test_mamba2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Mamba2Config(
        vocab_size=50,
        hidden_size=HIDDEN,
        state_size=5,
        num_hidden_layers=2,
        expand=2,
        conv_kernel=3,
        num_heads=6,
        head_dim=8,
        n_groups=2,
        chunk_size=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = build(transformers.Mamba2ForCausalLM, config)
    expected = with_mixers(model, mamba2_parts, monkeypatch)
    shapes = {name.rpartition("_")[2]: tuple(expected[name].shape) for name in expected if "layers.0.mixer.in_" in name}
    assert shapes == {"z": (48, 24), "x": (48, 24), "B": (10, 24), "C": (10, 24), "dt": (6, 24)}
    live = check_layouts(model, tmp_path, expected)
    assert_left_out(live, "backbone.layers.0.mixer")


def test_jamba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba with experts in one layer, attention with a dense MLP in the other."""
    config = transformers.JambaConfig(
        **COMMON,
        num_key_value_heads=2,
        intermediate_size=20,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=0,
        mamba_d_state=5,
        mamba_d_conv=3,
        mamba_expand=2,
        mamba_dt_rank=7,
    )
    model = build(transformers.JambaForCausalLM, config)
    expected = with_mixers(model, mamba1_parts, monkeypatch)
    assert "model.layers.0.mamba.in_proj_z" in expected
    assert "model.layers.0.feed_forward.experts.3.up_proj" in expected
    live = check_layouts(model, tmp_path, expected)
    assert_left_out(live, "model.layers.0.mamba")
    reasons = {tensor.name: tensor.reason for tensor in live.skipped}
    assert "router" in reasons["model.layers.0.feed_forward.router.weight"]


def test_bamba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.BambaConfig(
        **COMMON, **SSM_SIZES, num_key_value_heads=2, attn_layer_indices=[1], mamba_n_groups=1, mamba_expand=2
    )
    model = build(transformers.BambaForCausalLM, config)
    live = check_layouts(model, tmp_path, with_mixers(model, mamba2_parts, monkeypatch))
    assert_left_out(live, "model.layers.0.mamba")


def test_falcon_h1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and mixer side by side in each layer; the mixer is not twice as wide as the model."""
    config = transformers.FalconH1Config(
        **COMMON, **SSM_SIZES, num_key_value_heads=2, head_dim=10, mamba_d_ssm=48, mamba_n_groups=2, mamba_rms_norm=True
    )
    model = build(transformers.FalconH1ForCausalLM, config)
    live = check_layouts(model, tmp_path, with_mixers(model, mamba2_parts, monkeypatch))
    assert_left_out(live, "model.layers.0.mamba")


def test_zamba2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixers in all layers, and one transformer block that some of them share, with its own adapters."""
    config = transformers.Zamba2Config(
        **COMMON,
        layers_block_type=["mamba", "hybrid"],
        intermediate_size=20,
        mamba_d_state=5,
        mamba_d_conv=3,
        mamba_ngroups=2,
        n_mamba_heads=6,
        mamba_headdim=8,
        mamba_expand=2,
        num_mem_blocks=1,
        adapter_rank=3,
    )
    model = build(transformers.Zamba2ForCausalLM, config)
    expected = with_mixers(model, mamba2_parts, monkeypatch)
    # Zamba2MLP.forward: torch.chunk(gate_up_state, 2, dim=-1), act_fn(chunk 0) * chunk 1
    shared = "model.layers.1.shared_transformer.feed_forward"
    gate, up = model.get_submodule(f"{shared}.gate_up_proj").weight.detach().chunk(2)
    expected |= {f"{shared}.gate_proj": gate, f"{shared}.up_proj": up}
    live = check_layouts(model, tmp_path, expected)
    assert_left_out(live, "model.layers.1.mamba_decoder.mamba")


@torch.no_grad()
def test_zamba(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zamba's mixer: x and z on alternate rows of `in_proj`, and one scan per head."""
    config = transformers.ZambaConfig(
        **(COMMON | {"num_hidden_layers": 4}),
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        intermediate_size=20,
        mamba_d_state=5,
        mamba_d_conv=3,
        mamba_expand=2,
        mamba_dt_rank=7,
        n_mamba_heads=2,
    )
    model = build(transformers.ZambaForCausalLM, config)
    name = "model.layers.0.mamba"
    mixer = model.get_submodule(name)
    convolved, gates = [], []

    def convolution(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        convolved.append(x)
        return x

    def scan(x: torch.Tensor, *_: Any, z: torch.Tensor, **__: Any) -> torch.Tensor:
        gates.append(z)
        return x

    with monkeypatch.context() as patch:
        patch.setattr(functions_of(mixer), "causal_conv1d_fn", convolution)
        patch.setattr(functions_of(mixer), "mamba_selective_scan", scan)
        mixer(torch.eye(HIDDEN)[None])
    expected = {f"{name}.in_proj_x": convolved[0][0], f"{name}.in_proj_z": torch.cat(gates, dim=1)[0]}
    assert len(gates) == 2
    assert_whole(mixer.in_proj.weight, *expected.values())

    # Only these: the rest of the model is one transformer block in several places at once.
    analysis = esdtool.analyze(model, min_eigs=2, jobs=1, include=[r"layers\.0\.mamba\.in_proj"])
    assert {module.name: module.role for module in analysis.modules} == {
        f"{name}.in_proj_x": "in_proj_x",
        f"{name}.in_proj_z": "in_proj_z",
    }
    for part, matrix in expected.items():
        singular = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        np.testing.assert_allclose(np.sqrt(analysis.esds[part]), np.sort(singular), rtol=0, atol=1e-6 * singular.max())


# Gated short convolutions


@torch.no_grad()
def short_convolution_parts(mixer: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> Matrices:
    """B, C and x of Lfm2ShortConv: `B, C, x = in_proj(.).chunk(3)`; B * x is convolved, C multiplies the result.

    B and x change places without any effect; their names are the forward's own. C is where the forward says:
    what it multiplies is checked against the forward itself.
    """
    B, C, x = mixer.in_proj.weight.chunk(3)
    seen = {}

    def convolution(states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen["B x"] = states
        return torch.ones_like(states)

    hook = mixer.out_proj.register_forward_pre_hook(lambda _, inputs: seen.update(C=inputs[0]))
    with monkeypatch.context() as patch:
        patch.setattr(functions_of(mixer), "causal_conv1d_fn", convolution)
        mixer(torch.eye(HIDDEN)[None])
    hook.remove()
    torch.testing.assert_close(seen["B x"][0], B * x, rtol=0, atol=0)
    torch.testing.assert_close(seen["C"][0].T, C, rtol=0, atol=0)
    return {f"{name}.in_proj_B": B, f"{name}.in_proj_C": C, f"{name}.in_proj_x": x}


def test_lfm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Lfm2Config(
        **COMMON,
        num_key_value_heads=2,
        intermediate_size=20,
        block_auto_adjust_ff_dim=False,
        conv_L_cache=3,
        layer_types=["conv", "full_attention"],
    )
    model = build(transformers.Lfm2ForCausalLM, config)
    convolution = "model.layers.0.conv"
    expected = linears(model, "conv.in_proj")
    expected |= short_convolution_parts(model.model.layers[0].conv, convolution, monkeypatch)
    live = check_layouts(model, tmp_path, expected)
    (reason,) = (tensor.reason for tensor in live.skipped if tensor.name == f"{convolution}.conv.weight")
    assert "depthwise" in reason


def test_unsplit_mixers_keep_their_tensor() -> None:
    """`split_fused=False`: one module per tensor, under the tensor's own name."""
    model = mamba()
    analysis = esdtool.analyze(model, min_eigs=2, jobs=1, split_fused=False)
    roles = {module.name: module.role for module in analysis.modules}
    assert roles == {name: name.rpartition(".")[2] for name in linears(model)}
    name = "backbone.layers.1.mixer.in_proj"
    singular = np.linalg.svd(linears(model)[name].double().numpy(), compute_uv=False)
    np.testing.assert_allclose(np.sqrt(analysis.esds[name]), np.sort(singular), rtol=0, atol=1e-6 * singular.max())
