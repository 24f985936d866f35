"""LightGlue: the rows of `Wqkv` belong to a query, a key and a value in turn, `unflatten(-1, (heads, -1, 3))`."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.general import QKV
from esdtool.modules.rules import Family, fused, score

FAMILY = Family(
    name="lightglue",
    model_types=frozenset({"lightglue_original"}),  # the conversions for transformers store three matrices
    marker="transformers.#.cross_attn.to_qk",
    more_markers=("cross_attn.#.to_qk",),
    rules=(
        fused("self_attn.Wqkv", *QKV, layout=layouts.interleaved),
        fused("self_attn.#.Wqkv", *QKV, layout=layouts.interleaved),
        score("cross_attn.to_out", "cross_o_proj"),
        score("cross_attn.#.to_out", "cross_o_proj"),
        score("self_attn|cross_attn.ffn.0", "up_proj"),
        score("self_attn|cross_attn.ffn.3", "down_proj"),
        score("self_attn|cross_attn.#.ffn.0", "up_proj"),
        score("self_attn|cross_attn.#.ffn.3", "down_proj"),
        score("cross_attn.to_qk", "qk_proj"),
        score("cross_attn.#.to_qk", "qk_proj"),
    ),
)
