"""OLMo in its own format (`allenai/OLMo-*`, not the `-hf` conversions)."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.general import QKV
from esdtool.modules.reasons import LM_HEAD
from esdtool.modules.rules import Family, fused, score, skip

FAMILY = Family(
    name="olmo1",
    model_types=frozenset({"hf_olmo"}),
    marker="blocks.#.att_proj",
    rules=(
        fused("blocks.#.att_proj", *QKV, layout=layouts.query_key_value),
        skip("^ff_out", LM_HEAD),
        score("blocks.#.attn_out", "o_proj"),
        # With SwiGLU twice as wide, which its shape tells; the second half goes through the activation.
        score("blocks.#.ff_proj", "up_proj", halves=("up_proj", "gate_proj")),
        score("blocks.#.ff_out", "down_proj"),
    ),
)
