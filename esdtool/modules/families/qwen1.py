"""The first Qwen (and Qwen-VL's language model): `w2` is gated by SiLU, `w1` is the other half of the MLP."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.general import QKV
from esdtool.modules.rules import Family, fused, score

FAMILY = Family(
    name="qwen1",
    model_types=frozenset({"qwen"}),
    marker="h.#.mlp.w2",
    rules=(
        fused("attn.c_attn", *QKV, layout=layouts.query_key_value),
        score("mlp.w1", "up_proj"),
        score("mlp.w2", "gate_proj"),
    ),
)
