"""InternLM2: `wqkv` goes by key-value head."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.rules import Family, fused

FAMILY = Family(
    name="internlm2",
    model_types=frozenset({"internlm2", "internlm2_reward"}),
    rules=(fused("attention.wqkv", "q_proj", "k_proj", "v_proj", layout=layouts.per_key_value_head),),
)
