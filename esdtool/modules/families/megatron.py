"""Megatron-Core: `linear_qkv` goes by query group, each with its queries, its key and its value."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.general import QKV
from esdtool.modules.rules import Family, fused, score

FAMILY = Family(
    name="megatron",
    model_types=frozenset({"megatron", "megatron_core"}),
    marker="layers.#.self_attention.linear_qkv",
    rules=(
        fused("self_attention.linear_qkv", *QKV, layout=layouts.per_key_value_head),
        fused("cross_attention.linear_kv", "k_proj", "v_proj", layout=layouts.per_head),
        score("cross_attention.linear_q", "cross_q_proj"),
        score("self_attention.linear_proj", "o_proj"),
        score("cross_attention.linear_proj", "cross_o_proj"),
        # With a gated activation twice as wide, which its shape tells.
        score("mlp.linear_fc1", "up_proj"),
        score("mlp.linear_fc2", "down_proj"),
    ),
)
