"""The general rule tables: names that mean the same in (nearly) every model.

`COMPANIONS` are consulted before anything else: parts of a quantised, adapted or re-parametrised
weight, and buffers; their patterns are about the whole parameter name, `.weight` included.
Families come next, then `NOT_SCORED`, `MANY_IN_ONE` and `ROLES`. What no rule names is scored
under its own name if it is a matrix or a convolution. For the language of the patterns see
`esdtool.modules.rules`; to teach esdtool a new naming, add one file to `families/`.
"""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.reasons import (
    BIAS_MATRIX,
    EMBEDDING,
    INDEX_BUFFER,
    LEARNED_TOKENS,
    LM_HEAD,
    LORA,
    MASK,
    NORM_MATRIX,
    OUTPUT_HEAD,
    PATCH_EMBEDDING,
    POSITIONS,
    QUANT_CODES,
    QUANT_SCALE,
    REPARAMETRISED,
    ROTARY,
    ROUTER,
    RUNNING_STATISTICS,
    SCALE_MATRIX,
    TOKEN_EMBEDDING,
    TOKEN_TYPES,
)
from esdtool.modules.rules import Rule, fused, score, skip, stacked
from esdtool.modules.skipped import SkipKind, SkipReason

GATE_UP = ("gate_proj", "up_proj")
QKV = ("q_proj", "k_proj", "v_proj")

CROSS_ATTENTION = (
    r"EncDecAttention|encoder_attn|crossattention|cross_attn(_\w+)?|cross_attention|multihead_attn"
    r"|decoding_cross_attention"
)
"""Names of cross-attention modules: roles q_proj, k_proj, v_proj, o_proj beneath become cross_q_proj, ..."""

STACKED_IF_3D = "experts|input_linear|output_linear"
"""A 3-D tensor with such a segment is a stack of experts' matrices, not the kernel of a convolution."""


def _quiet(pattern: str, reason: SkipReason, beside: str | None = None) -> Rule:
    """A companion: skipped whatever its shape and dtype, and never forced in."""
    return skip(pattern, reason, forceable=False, beside=beside)


COMPANIONS: tuple[Rule, ...] = (
    # GPTQ, AWQ, HQQ, AQLM, bitsandbytes, compressed-tensors, quanto, torchao, MXFP4
    _quiet("qweight|weight_packed|codes|codebooks|*_blocks|_weight_qdata|_data", QUANT_CODES),
    _quiet("qzeros|scales|*_scales|weight_scale*|_weight_scale|scale_weight", QUANT_SCALE),
    _quiet("*_scale_inv|*_proj_scale|*_global_scale", QUANT_SCALE),
    _quiet("input_scale*|scale_input|output_scale|k_scale|v_scale|q_scale", QUANT_SCALE),
    _quiet("weight_zero_point|_weight_zero_point|input_zero_point|weight_g_idx|g_idx|weight_shape", QUANT_SCALE),
    _quiet("SCB|weight_format|absmax|nested_absmax|quant_map|nested_quant_map", QUANT_SCALE),
    _quiet("quant_state.**", QUANT_SCALE),
    _quiet("weight.scale|_scale|_shift|zero_point|zero", QUANT_SCALE),
    _quiet("scale|zero", QUANT_SCALE, beside="qweight"),
    _quiet("scale|zero", QUANT_SCALE, beside="W_q"),
    # Adapters
    _quiet("lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_down|lora_mid|lora_up|lora_a|lora_b.**", LORA),
    _quiet("*_lora|lora|lora_linear_layer.down|up.**", LORA),
    _quiet(
        "hada_*|lokr_*|vera_A|vera_B|vera_lambda_*.**",
        SkipReason(
            kind=SkipKind.ADAPTER,
            words="factor of an adapter without its counterparts: only their product is a weight update",
        ),
    ),
    _quiet(
        "lora_magnitude_vector|dora_scale.**", SkipReason(kind=SkipKind.ADAPTER, words="magnitudes of a DoRA adapter")
    ),
    _quiet(
        "trainable_tokens_delta|trainable_tokens_original.**",
        SkipReason(kind=SkipKind.ADAPTER, words="rows of a token embedding that an adapter trains"),
    ),
    # Re-parametrised weights: the parameter is not the weight that acts
    _quiet("parametrizations.**", REPARAMETRISED),
    _quiet("weight_g|weight_v|weight_u|weight_orig|weight_mask", REPARAMETRISED),
    # Buffers
    _quiet("inv_freq|*_inv_freq|freqs_cis|freqs|cos_cached|sin_cached|cos|sin", ROTARY),
    _quiet("position_ids|token_type_ids", INDEX_BUFFER),
    _quiet("masked_bias|attn_mask|causal_mask|attention_mask|mask|relative_position_index", MASK),
    _quiet("running_mean|running_var|num_batches_tracked", RUNNING_STATISTICS),
)

NOT_SCORED: tuple[Rule, ...] = (
    # Output heads: everything after the last block that makes the model's output
    skip("lm_head.**", LM_HEAD),
    skip("cls.predictions.**", LM_HEAD),
    skip("predictions.dense|decoder", LM_HEAD),
    skip("generator_predictions|discriminator_predictions.**", LM_HEAD),
    skip("embed_out|generator_lm_head|vocab_projector|vocab_transform|lm_loss|lm_head_weight", LM_HEAD),
    skip("^output_projection|proj_out|output|output_layer", LM_HEAD),
    skip("decoder.output_projection", LM_HEAD),
    skip("shared_head.head", LM_HEAD),
    skip("cls.seq_relationship", OUTPUT_HEAD),
    skip("^cls.**", OUTPUT_HEAD),
    skip("^classifier|score|head|qa_outputs|head_dist|v_head|value_head|reward_head", OUTPUT_HEAD),
    skip("^classifier.dense|out_proj", OUTPUT_HEAD),
    skip("^classification_head|multiple_choice_head|heads.**", OUTPUT_HEAD),
    skip("^head.fc|dense", OUTPUT_HEAD),
    # Position tables
    skip("wpe|embed_positions|*position*_embeddings|*position_embedding|*positional_embedding*", POSITIONS),
    skip("position_embeds_layer", POSITIONS),
    skip("*pos_emb|pos_embed|*_pos_embed|*pos_embedding|relative_attention_bias|rel_embeddings", POSITIONS),
    skip("*relative_position_bias_table|relative_position_bias|rel_pos_h|rel_pos_w|seg_embed", POSITIONS),
    skip("*position_embeddings.**", POSITIONS),
    # Token and other embeddings
    skip("wte|*embed_tokens|word_embeddings|word_embedding|tok_embeddings|tok_emb", TOKEN_EMBEDDING),
    skip("input_embeds_layer|embed_in|token_embedding|token_embeddings", TOKEN_EMBEDDING),
    skip("embeddings", TOKEN_EMBEDDING),
    skip("^shared|embedding|embed|emb", TOKEN_EMBEDDING),
    skip("token_type_embeddings", TOKEN_TYPES),
    skip("cls_token|*mask_token|*_tokens|dist_token|reg_token|class_embedding|latents|probe|queries", LEARNED_TOKENS),
    skip("*patch_embed*|embed_patches.**", PATCH_EMBEDDING),
    skip("embeddings.**", EMBEDDING),
    skip("*_embed|*_embedding|*_embeddings|*_emb|embed|embedding|emb", EMBEDDING),
    skip("embed_*", EMBEDDING),
    # Routers
    skip("*router.**", ROUTER),
    skip("*shared_expert_gate", ROUTER),
    skip("gate.wg", ROUTER),
    skip("gate", ROUTER, beside="experts"),
    # Vectors stored as matrices
    skip("*norm|*Norm|*norm#|ln_*|*layer_norm|*layernorm", NORM_MATRIX, forceable=False),
    skip("bias|*_bias|bias_*", BIAS_MATRIX, forceable=False),
    skip("scale|gamma|beta|*_gamma|*_beta|layer_scale*", SCALE_MATRIX, forceable=False),
)

MANY_IN_ONE: tuple[Rule, ...] = (
    fused("c_attn", "k_proj", "v_proj", beside="q_attn"),  # GPT-2 cross-attention
    # One name, several layouts: the families know their own.
    fused("query_key_value", *QKV, layout=layouts.unknown),
    # InternLM2's, and CodeGen's, lie otherwise than those of other models with these names.
    fused("wqkv", *QKV, layout=layouts.query_key_value_of_config),
    fused("h.#.attn.qkv_proj", *QKV, layout=layouts.query_key_value_of_config),
    fused("c_attn|qkv_proj|qkv_linear|Wqkv|qkv|W_pack|to_qkv|att_proj", *QKV, layout=layouts.query_key_value),
    fused("in_proj_weight", *QKV),  # torch.nn.MultiheadAttention
    fused("attention|self_attention|self_attn|attn|self.in_proj", *QKV, layout=layouts.query_key_value),
    fused("kv_proj|Wkv|to_kv|kv", "k_proj", "v_proj"),
    fused("gate_up_proj", *GATE_UP, layout=layouts.gate_up_of_config, beside="gate_up_proj_bias"),
    fused(
        "gate_up_proj|up_gate_proj|gate_up|w12|w13|gated_layers|weights_in|ff_gate_up",
        *GATE_UP,
        layout=layouts.gate_up,
    ),
    # GraniteMoE, JetMoE
    fused("mlp|shared_mlp|moe|block_sparse_moe.input_linear", *GATE_UP, layout=layouts.gate_up),
    stacked("self_attention.experts.input_linear", "q_proj"),  # JetMoE's mixture of attention heads
    stacked("self_attention.experts.output_linear", "o_proj"),
    fused("kv_a_proj_with_mqa|wkv_a", "kv_a_proj", "k_pe_proj", layout=layouts.latent_rope),
    fused("kv_b_proj|wkv_b", "k_b_proj", "v_b_proj", layout=layouts.latent_key_value),
    fused("in_proj_qkvz", *QKV, "z_proj", layout=layouts.gated_delta),
    fused("in_proj_qkv", *QKV, layout=layouts.gated_delta_contiguous),
    fused("in_proj_ba", "b_proj", "a_proj", layout=layouts.by_key_head),
    stacked("experts.mlp.w1", "gate_proj"),  # DBRX: [experts * ffn, hidden], 2-D
    stacked("experts.mlp.v1", "up_proj"),
    stacked("experts.mlp.w2", "down_proj"),
)

ROLES: tuple[Rule, ...] = (
    # Attention
    score("q_proj|q_proj_weight|query_proj|q_lin|to_q|q_attn|q_head|Wq|W_q|w_q", "q_proj"),
    score("k_proj|k_proj_weight|key_proj|k_lin|to_k|k_head|Wk|W_k|w_k", "k_proj"),
    score("v_proj|v_proj_weight|value_proj|v_lin|to_v|v_head|Wv|W_v|w_v", "v_proj"),
    score("o_proj|out_lin|post_proj|W_o|w_o", "o_proj"),
    score("to_out.#", "o_proj"),
    score("*attn|*attention|*Attention.q|wq|query", "q_proj"),
    score("*attn|*attention|*Attention.k|wk|key", "k_proj"),
    score("*attn|*attention|*Attention.v|wv|value", "v_proj"),
    score("*attn|*attention|*Attention.o|wo|Wo|dense|out_proj|c_proj|proj|projection", "o_proj"),
    # MLP
    score("gate_proj|wi_0|fc1_g", "gate_proj"),
    score("up_proj|wi_1|wi|Wi|fc1_x", "up_proj"),
    score("down_proj", "down_proj"),
    score("mlp|ffn|feed_forward|ff.gate", "gate_proj"),
    score("mlp|ffn|feed_forward|ff.up|fc1|linear_fc1|fc_in|c_fc|dense_h_to_4h|in_proj", "up_proj"),
    score("mlp|ffn|feed_forward|ff.lin1|linear_1|layer_1|dense1", "up_proj"),
    score("mlp|ffn|feed_forward|ff.down|fc2|linear_fc2|fc_out|c_proj|dense_4h_to_h|out_proj", "down_proj"),
    score("mlp|ffn|feed_forward|ff.lin2|linear_2|layer_2|dense2", "down_proj"),
    score("up", "up_proj", beside="down"),
    score("down", "down_proj", beside="up"),
    score("gate", "gate_proj", beside="down"),
    score("mlp|DenseReluDense|expert_#.wo|Wo", "down_proj"),
    score("layers|layer|h|blocks.#.fc1|linear1", "up_proj"),
    score("layers|layer|h|blocks.#.fc2|linear2", "down_proj"),
    score("intermediate_dense", "up_proj"),
    score("output_dense|weights_out", "down_proj"),
    score("mlp|shared_mlp|moe|block_sparse_moe.output_linear", "down_proj"),
    # LLaMA's original names, kept by Mixtral: w1 is the gate where a w3 exists
    score("w1", "gate_proj", beside="w3"),
    score("w3", "down_proj", beside="w12"),
    score("w3", "up_proj", beside="w1"),
    score("w2", "down_proj", beside="w1"),
    score("w1", "up_proj", beside="w2"),
)
