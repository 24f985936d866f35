"""Diffusion transformers with an image and a text stream: Flux, HunyuanVideo, Stable Diffusion 3.

`single_blocks.N.linear1` gives queries, keys and values to the attention and the rest to the MLP beside it.
"""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.general import QKV
from esdtool.modules.rules import Family, fused, score

FAMILY = Family(
    name="mmdit",
    model_types=frozenset({"flux", "hunyuan_video"}),
    marker="single_blocks.#.linear1",
    more_markers=("double_blocks.#.img_attn.qkv", "double_blocks.#.img_attn_qkv", "joint_blocks.#.x_block.attn.qkv"),
    rules=(
        fused("single_blocks.#.linear1", *QKV, "up_proj", layout=layouts.attention_beside_mlp),
        score("single_blocks.#.linear2", "linear2"),
        fused("img_attn|txt_attn.qkv", *QKV, layout=layouts.stacked_rows),
        fused("img_attn_qkv|txt_attn_qkv|self_attn_qkv", *QKV, layout=layouts.stacked_rows),
        fused("x_block|context_block.attn.qkv", *QKV, layout=layouts.stacked_rows),
        fused("x_block.attn2.qkv", *QKV, layout=layouts.stacked_rows),
        score("img_attn_proj|txt_attn_proj|self_attn_proj", "o_proj"),
        score("img_mlp|txt_mlp.0", "up_proj"),
        score("img_mlp|txt_mlp.2", "down_proj"),
        score("img_mlp|txt_mlp.fc1", "up_proj"),
        score("img_mlp|txt_mlp.fc2", "down_proj"),
    ),
)
