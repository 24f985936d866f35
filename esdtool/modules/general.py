"""The general rule tables: names that mean the same in (nearly) every model.

`COMPANIONS` are consulted before anything else: parts of a quantised, adapted or re-parametrised
weight, and buffers; their patterns are about the whole parameter name, `.weight` included.
Families come next, then `NOT_SCORED`, `MANY_IN_ONE` and `ROLES`. What no rule names is scored
under its own name if it is a matrix or a convolution. For the language of the patterns see
`esdtool.modules.rules`; to teach esdtool a new naming, add one file to `families/`.
"""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.reasons import ACTIVATION_STATISTICS as STATISTICS
from esdtool.modules.reasons import (
    BIAS_MATRIX,
    CODEBOOK,
    CTC_HEAD,
    EMBEDDING,
    FILTER_BANK,
    INDEX_BUFFER,
    LEARNED_TOKENS,
    LM_HEAD,
    LORA,
    MASK,
    NORM_MATRIX,
    OPTIMIZER_STATE,
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
    VALUE_EMBEDDING,
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
    _quiet("biases|zeros", QUANT_SCALE, beside="scales"),
    _quiet("biases", QUANT_SCALE, beside="weight_scale"),
    # Statistics of activations, kept by calibration and by training for quantised numbers
    _quiet("activation_post_process|input_quantizer|output_quantizer|weight_quantizer|*fake_quant*.**", STATISTICS),
    _quiet("amax|*_amax|act_scale*|activation_scale*|smooth_scale*|min_val|max_val|input_max|output_max", STATISTICS),
    # An optimizer's state, saved with the weights
    _quiet("exp_avg*|max_exp_avg*|momentum_buffer|square_avg|grad_avg|acc_delta|master_param", OPTIMIZER_STATE),
    _quiet("state1|state2", OPTIMIZER_STATE, beside="step"),
    _quiet("optimizer|optimizer_state|optimizer_states|optim_state.**", OPTIMIZER_STATE),
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
    _quiet("lora_left|lora_right.**", LORA),
    # Re-parametrised weights: the parameter is not the weight that acts
    _quiet("parametrizations.**", REPARAMETRISED),
    _quiet("weight_g|weight_v|weight_u|weight_orig|weight_mask", REPARAMETRISED),
    # Buffers
    _quiet("inv_freq|*_inv_freq|freqs_cis|freqs|cos_cached|sin_cached|cos|sin", ROTARY),
    _quiet(
        "*_cos_cached|*_sin_cached|cos_table|sin_table|*_cos|*_sin|rope_freqs|rotary_freqs|freqs_cos|freqs_sin", ROTARY
    ),
    _quiet("pos_freqs|freq_cis|rope_cache|rope_cos_sin|cos_sin_cache|rotary_table", ROTARY),
    _quiet("tril|triu|*_tril|attention_bias_mask|attn_mask|attn_masks|*_causal_mask|window_mask", MASK),
    _quiet("position_ids|token_type_ids", INDEX_BUFFER),
    _quiet("masked_bias|attn_mask|causal_mask|attention_mask|mask|relative_position_index", MASK),
    _quiet("running_mean|running_var|num_batches_tracked", RUNNING_STATISTICS),
)

NOT_SCORED: tuple[Rule, ...] = (
    # Fixed by a formula: the front ends of speech and music models
    _quiet("mel_scale|melscale.fb", FILTER_BANK),
    _quiet("fb|*_fb|fbank|fbanks|*_fbank|filterbank|filter_bank|*filter_banks|*_filterbank", FILTER_BANK),
    _quiet("mel_basis|*_mel_basis|melW|mel_filter*|mel_weight*|mel_bank*|mel_matrix|mel_fbank*|inv_mel*", FILTER_BANK),
    _quiet("dct|dct_mat|dct_matrix|*_dct|dct_basis|idct*|erb_filter*|erb_bands|erb_matrix", FILTER_BANK),
    _quiet("cqt_kernel*|cqt_basis|*_cqt_kernel*|chroma_fb*|forward_basis|inverse_basis|wsin|wcos", FILTER_BANK),
    _quiet(
        "kernel_sin|kernel_cos|*_kernels_real|*_kernels_imag|window_mask|lowpass_filter|dft_mat*|stft_basis",
        FILTER_BANK,
    ),
    _quiet("stft.conv_real|conv_imag", FILTER_BANK),
    # Tables of vector quantisers
    _quiet("codebook|_codebook|codebooks|*_codebook|codevectors|code_vectors|codewords", CODEBOOK),
    _quiet("*codebook.embed|embedding|embedding_sum|embeddings|embed_avg|embed_sum|codes", CODEBOOK),
    _quiet("embedding_sum|embed_avg|ema_embed|ema_w|_ema_w|embed_ema", CODEBOOK),
    _quiet("quantize|quantizer|vq|vq_layer|_vq_vae|bottleneck.embedding|_embedding|embed|embeddings", CODEBOOK),
    # Token vectors that blocks add to the values of attention (modded-nanogpt)
    skip("value_embed|value_embeds|value_embedding|value_embeddings|value_embs.**", VALUE_EMBEDDING),
    skip("ve|ves.#", VALUE_EMBEDDING),
    # Heads by the names of speech toolkits and of others
    skip("ctc.**", CTC_HEAD),
    skip("ctc_lo|ctc_lin|ctc_head|ctc_proj|ctc_layer|ctc_linear|ctc_fc|ctc_output|ctc_decoder.**", CTC_HEAD),
    skip("^decoder.decoder_layers.#", CTC_HEAD),  # NeMo's convolution onto the vocabulary
    skip("^out_head|output_head|to_logits|logits|unembed|unembedding|logits_proj|lm_projection", LM_HEAD),
    skip("final_layer.linear", OUTPUT_HEAD),  # diffusion transformers
    skip("visual.conv1", PATCH_EMBEDDING),  # CLIP as OpenAI and open_clip store it
    skip("^conv_proj", PATCH_EMBEDDING),  # torchvision's vision transformer
    skip("to_patch_embedding.**", PATCH_EMBEDDING),
    skip("x_embedder.proj", PATCH_EMBEDDING),  # diffusion transformers
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
    # Whole paths, which only models of one layout have.
    fused("h.#.attn.c_attn", *QKV, layout=layouts.thirds_of_columns),
    fused("layers.#.self_attn.W_pack", *QKV, layout=layouts.query_key_value),  # Baichuan
    fused("blocks.#.attn.qkv", *QKV, layout=layouts.query_key_value),  # timm and all that build on it
    fused("in_proj_weight", *QKV),  # torch.nn.MultiheadAttention
    # Where config.json is missing: the layout of every model with these paths that is known to have no other.
    fused("layers.#.self_attn.qkv_proj", *QKV, layout=layouts.equal_without_config),
    fused("layers.#.attn.qkv", *QKV, layout=layouts.equal_without_config),
    fused("transformer.blocks.#.attn.Wqkv", *QKV, layout=layouts.equal_without_config),
    fused("layers.#.attn.kv_proj", "k_proj", "v_proj", layout=layouts.equal_without_config),
    # One name, several layouts: the families know their own.
    fused("query_key_value|c_attn|wqkv|Wqkv|qkv|to_qkv|qkv_proj|qkv_linear|linear_qkv", *QKV, layout=layouts.unknown),
    fused("W_pack|att_proj|attn_qkv|self_attn_qkv|img_attn_qkv|txt_attn_qkv", *QKV, layout=layouts.unknown),
    fused("attn.attn", *QKV, layout=layouts.unknown),  # litgpt
    fused("attention|self_attention|self_attn|attn|self.in_proj", *QKV, layout=layouts.unknown),
    fused("kv_proj|Wkv|to_kv|kv|linear_kv|key_value", "k_proj", "v_proj", layout=layouts.unknown),
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
    score("att|attn|attention.W_query", "q_proj"),
    score("att|attn|attention.W_key", "k_proj"),
    score("att|attn|attention.W_value", "v_proj"),
    score("W_query", "q_proj", beside="W_key"),
    score("W_key", "k_proj", beside="W_query"),
    score("W_value", "v_proj", beside="W_query"),
    score("out_proj", "o_proj", beside="W_query"),
    score("linear_q", "q_proj"),  # ESPnet, WeNet, NeMo
    score("linear_k", "k_proj"),
    score("linear_v", "v_proj"),
    score("linear_out", "o_proj", beside="linear_q"),
    score("self_attention|cross_attention|self_attn.linear_proj", "o_proj"),  # Megatron
    score("out", "o_proj", beside="query"),  # Whisper as OpenAI stores it
    # MLP
    score("blocks|layers|layer|resblocks|trf_blocks|h.#.mlp|ff|ffn.0", "up_proj", beside="2"),
    score("blocks|layers|layer|resblocks|trf_blocks|h.#.mlp|ff|ffn.2", "down_proj", beside="0"),
    score("mlp|ff|ffn|feed_forward.layers|net.0", "up_proj", beside="2"),
    score("mlp|ff|ffn|feed_forward.layers|net.2", "down_proj", beside="0"),
    score("ff|ffn.net.0.proj", "up_proj"),  # diffusers
    score("ff|ffn.net.2", "down_proj"),
    score("mlp.fc_1", "gate_proj", beside="proj"),  # litgpt
    score("mlp.fc_2", "up_proj", beside="proj"),
    score("mlp.fc", "up_proj", beside="proj"),
    score("mlp.proj", "down_proj"),
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
