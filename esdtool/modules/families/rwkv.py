"""RWKV 4: `key` and `value` of the channel mixing are the MLP's two matrices."""

from __future__ import annotations

from esdtool.modules.reasons import TIME_MIXING
from esdtool.modules.rules import Family, score, skip

FAMILY = Family(
    name="rwkv",
    model_types=frozenset({"rwkv"}),
    marker="attention.receptance",
    rules=(
        score("attention.output", "o_proj"),
        score("feed_forward.key", "up_proj"),
        score("feed_forward.value", "down_proj"),
        skip("time_mix_*|time_decay|time_first", TIME_MIXING),
    ),
)
