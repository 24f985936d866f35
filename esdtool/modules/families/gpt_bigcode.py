"""GPT-BigCode (SantaCoder, StarCoder): `c_attn` with one key-value head, or head by head."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.rules import Family, fused

FAMILY = Family(
    name="gpt_bigcode",
    model_types=frozenset({"gpt_bigcode"}),
    rules=(
        fused("c_attn", "k_proj", "v_proj", beside="q_attn"),  # cross-attention
        fused("c_attn", "q_proj", "k_proj", "v_proj", layout=layouts.bigcode),
    ),
)
