"""MiniMax-Text: `qkv_proj` of its lightning attention goes head by head."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.general import QKV
from esdtool.modules.rules import Family, fused

FAMILY = Family(
    name="minimax",
    model_types=frozenset({"minimax", "minimax_text_01", "minimax_vl_01"}),
    marker="layers.#.self_attn.output_gate",
    rules=(fused("self_attn.qkv_proj", *QKV, layout=layouts.per_head),),
)
