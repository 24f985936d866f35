"""GPT-NeoX (Pythia), BLOOM, Persimmon: `query_key_value` goes head by head."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.rules import Family, fused

FAMILY = Family(
    name="gpt_neox",
    model_types=frozenset({"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "fuyu"}),
    rules=(fused("query_key_value", "q_proj", "k_proj", "v_proj", layout=layouts.per_head),),
)
