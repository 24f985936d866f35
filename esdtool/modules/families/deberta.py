"""DeBERTa, first version: `in_proj` goes head by head."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.rules import Family, fused

FAMILY = Family(
    name="deberta",
    model_types=frozenset({"deberta"}),
    marker="attention.self.in_proj",
    rules=(fused("attention.self.in_proj", "q_proj", "k_proj", "v_proj", layout=layouts.per_head),),
)
