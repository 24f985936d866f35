"""The names that llama.cpp gives to the tensors of every model in a GGUF file, those of mmproj files included.

Its converters store queries, keys and values one after the other whatever the model's own layout, turn GPT-2's
transposed matrices, and permute rows of queries and keys within heads for some rotary embeddings, which leaves
spectra as they are.
"""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.general import QKV
from esdtool.modules.reasons import (
    DECAY_RATES,
    DEPTHWISE,
    LEARNED_TOKENS,
    LM_HEAD,
    OUTPUT_HEAD,
    PATCH_EMBEDDING,
    POSITIONS,
    ROTARY,
    ROUTER,
    STATE_SPACE,
    TIME_MIXING,
    TOKEN_EMBEDDING,
    TOKEN_TYPES,
)
from esdtool.modules.rules import Family, fused, score, skip, stacked

FAMILY = Family(
    name="gguf",
    model_types=frozenset({"gguf"}),  # no model's own: the marker decides
    marker="blk.#.**",
    rules=(
        # Outside the blocks
        skip("^token_embd|per_layer_token_embd|token_embd_norm", TOKEN_EMBEDDING),
        skip("nextn.embed_tokens", TOKEN_EMBEDDING),
        skip("token_embd.img_break", TOKEN_EMBEDDING),
        skip("^token_types", TOKEN_TYPES),
        skip("^position_embd", POSITIONS),
        skip("position_embd|pos_embd|pos_embd_k|attn_rel_b|cross_attn_rel_b|attn_rel_pos_emb|pos_h|pos_w", POSITIONS),
        skip("patch_embd.**", PATCH_EMBEDDING),
        skip("class_embd|image_newline|view_seperator|boi|eoi|image_begin|image_end", LEARNED_TOKENS),
        skip("resampler.query", LEARNED_TOKENS),
        skip("^output", LM_HEAD),
        skip("nextn.shared_head_head", LM_HEAD),
        skip("^cls", OUTPUT_HEAD),
        skip("^cls.output", OUTPUT_HEAD),
        skip("rope_freqs|rope_factors_long|rope_factors_short|attn_rot_embd", ROTARY, forceable=False),
        # Attention
        fused("blk.#.attn_qkv", *QKV, layout=layouts.gated_delta_contiguous, beside="ssm_ba"),  # Qwen3-Next
        fused("blk.#.attn_qkv", *QKV, layout=layouts.gated_delta_contiguous, beside="ssm_alpha"),  # Qwen3.5
        fused("blk.#.attn_qkv|vis_attn_qkv", *QKV, layout=layouts.query_key_value),
        fused("blk.#.attn.qkv", *QKV, layout=layouts.query_key_value),
        score("blk|proj_blk|posnet.#.attn_q|self_attn_q", "q_proj"),
        score("blk|proj_blk|posnet.#.attn_k|self_attn_k", "k_proj"),
        score("blk|proj_blk|posnet.#.attn_v|self_attn_v", "v_proj"),
        score("blk|proj_blk|posnet.#.attn_output|attn_out|attn_o|vis_attn_output|self_attn_out", "o_proj"),
        score("blk.#.attn.out", "o_proj"),
        score("blk|proj_blk.#.cross_attn_q", "cross_q_proj"),
        score("blk|proj_blk.#.cross_attn_k", "cross_k_proj"),
        score("blk|proj_blk.#.cross_attn_v", "cross_v_proj"),
        score("blk|proj_blk.#.cross_attn_o|cross_attn_out", "cross_o_proj"),
        score("blk.#.attn_gate", "z_proj", beside="ssm_ba"),
        score("blk.#.attn_gate", "z_proj", beside="ssm_alpha"),
        # Latent attention (DeepSeek)
        score("blk.#.attn_q_a", "q_a_proj"),
        score("blk.#.attn_q_b", "q_b_proj"),
        fused("blk.#.attn_kv_a_mqa", "kv_a_proj", "k_pe_proj", layout=layouts.latent_rope),
        fused("blk.#.attn_kv_b", "k_b_proj", "v_b_proj", layout=layouts.latent_key_value),
        score("blk.#.attn_k_b", "k_b_proj"),
        score("blk.#.attn_v_b", "v_b_proj"),
        # MLP. An `ffn_up` twice as wide as `ffn_down` (Phi-3, ChatGLM) is seen by its shape.
        skip("blk.#.ffn_gate_inp|ffn_gate_inp_shexp|altup_router", ROUTER),
        stacked("blk.#.ffn_gate_exps|ffn_gate_chexps", "gate_proj"),
        stacked("blk.#.ffn_up_exps|ffn_up_chexps", "up_proj"),
        stacked("blk.#.ffn_down_exps|ffn_down_chexps", "down_proj"),
        stacked("blk.#.ffn_gate_up_exps", "gate_proj", "up_proj", layout=layouts.stacked_rows),
        score("blk|proj_blk.#.ffn_gate|ffn_gate_1|ffn_gate_shexp|vis_gate", "gate_proj"),
        score("blk|proj_blk.#.ffn_up|ffn_up_1|ffn_up_shexp|vis_up", "up_proj"),
        score("blk|proj_blk.#.ffn_down|ffn_down_1|ffn_down_shexp|vis_down", "down_proj"),
        score("blk.#.ffn_gate.#", "gate_proj"),  # experts of the first mixtures, one tensor each
        score("blk.#.ffn_up.#", "up_proj"),
        score("blk.#.ffn_down.#", "down_proj"),
        # State spaces: Mamba has `ssm_x`, Mamba-2 has not, Qwen3-Next has `ssm_ba` and its own order.
        fused("blk.#.ssm_in", "in_proj_x", "in_proj_z", layout=layouts.stacked_rows, beside="ssm_x"),
        fused("blk.#.ssm_in", *QKV, "z_proj", layout=layouts.gated_delta, beside="ssm_ba"),
        fused("blk.#.ssm_in", "in_proj_z", "in_proj_x", "in_proj_B", "in_proj_C", "in_proj_dt", layout=layouts.mamba2),
        fused("blk.#.ssm_ba", "b_proj", "a_proj", layout=layouts.by_key_head),
        score("blk.#.ssm_x", "x_proj"),
        score("blk.#.ssm_dt", "dt_proj"),
        score("blk.#.ssm_out", "out_proj"),
        skip("blk.#.ssm_a", DECAY_RATES),
        skip("blk.#.ssm_d", STATE_SPACE),
        skip(
            "blk.#.ssm_conv1d|ssm_conv1d_q|ssm_conv1d_k|ssm_conv1d_v|conv_dw",
            DEPTHWISE,
        ),
        skip("blk.#.shortconv.conv", DEPTHWISE),
        fused("blk.#.shortconv.in_proj", "in_proj_B", "in_proj_C", "in_proj_x", layout=layouts.stacked_rows),  # LFM2
        # RWKV
        score("blk.#.time_mix_output", "o_proj"),
        score("blk.#.channel_mix_key", "up_proj"),
        score("blk.#.channel_mix_value", "down_proj"),
        skip("blk.#.time_mix_lerp_*|time_mix_first|time_mix_decay|time_mix_r_k", TIME_MIXING),
    ),
)
