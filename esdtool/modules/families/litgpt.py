"""Names of litgpt: queries, keys and values of `attn.attn`, the name of its first years, go by query group."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.general import QKV
from esdtool.modules.rules import Family, fused, score

FAMILY = Family(
    name="litgpt",
    model_types=frozenset({"litgpt"}),
    marker="transformer.h.#.attn.attn",
    rules=(
        fused("attn.attn", *QKV, layout=layouts.per_key_value_head),
        score("h.#.attn.proj", "o_proj"),
    ),
)
