"""RWKV: `key` and `value` of the channel mixing are the MLP's two matrices.

RWKV 4 in transformers' names, 4 to 7 in those of its author. The small pairs `w1`, `w2` (and `a`, `v`, `g`) of
RWKV 7, and `time_maa_w1` and the like of RWKV 6, are low-rank maps that the model applies one after the other.
"""

from __future__ import annotations

from esdtool.modules.reasons import TIME_MIXING, TIME_TABLE
from esdtool.modules.rules import Family, score, skip

FAMILY = Family(
    name="rwkv",
    model_types=frozenset({"rwkv", "rwkv5", "rwkv6", "rwkv7"}),
    marker="attention.receptance",
    more_markers=("att.receptance", "att.time_decay", "att.time_faaaa", "att.r_k"),
    rules=(
        score("attention|att.receptance", "receptance"),
        score("attention|att.key", "k_proj"),
        score("attention|att.value", "v_proj"),
        score("attention|att.gate", "g_proj"),
        score("attention|att.output", "o_proj"),
        score("feed_forward|ffn.receptance", "receptance"),
        score("feed_forward|ffn.key", "up_proj"),
        score("feed_forward|ffn.value", "down_proj"),
        score("att|ffn.time_decay_w1|time_decay_w2|time_maa_w1|time_mix_w1|time_maa_rkvw_w1", "low_rank"),
        score("att.w1|w2|a1|a2|v1|v2|g1|g2", "low_rank"),
        skip("time_mix_*|time_decay|time_first", TIME_MIXING),
        skip("time_faaaa|time_decay*|time_first*|time_maa_*|r_k|k_k|k_a|bonus", TIME_TABLE),
        skip("att|ffn.x_*|w0|a0|v0", TIME_TABLE),
    ),
)
