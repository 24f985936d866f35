"""OLMo in its own format (`allenai/OLMo-*`, not the `-hf` conversions)."""

from __future__ import annotations

from esdtool.modules.rules import Family, score, skip

FAMILY = Family(
    name="olmo1",
    model_types=frozenset({"hf_olmo"}),
    marker="blocks.#.att_proj",
    rules=(
        skip("^ff_out", "language-model head"),
        score("blocks.#.attn_out", "o_proj"),
        score("blocks.#.ff_proj", "up_proj"),  # with SwiGLU twice as wide, which its shape tells
        score("blocks.#.ff_out", "down_proj"),
    ),
)
