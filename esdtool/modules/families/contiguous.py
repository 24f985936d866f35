"""Families that store all queries, then all keys, then all values under names that others use for other layouts."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.general import GATE_UP, QKV
from esdtool.modules.rules import Family, fused

FAMILY = Family(
    name="contiguous",
    model_types=frozenset(
        (
            *("baichuan", "dbrx", "glm", "glm4", "gpt2", "hf_olmo", "imagegpt", "jetmoe", "mpt", "phi3", "qwen"),
            *("bark", "semantic", "coarse_acoustics", "fine_acoustics", "modernbert", "timm_wrapper"),
            *("blip", "blip_2", "clip", "llava", "paligemma", "phi4mm", "sam", "sam_vision_model"),
            *(
                "phi3_v",
                "qwen2_vl",
                "qwen2_5_vl",
                "qwen3_vl",
                "sam_hq",
                "sam_hq_vision_model",
                "sam2",
                "sam2_vision_model",
            ),
            *("decision_transformer", "hiera", "nomic_bert", "openai-gpt", "sam2_hiera_det_model", "vitdet"),
        )
    ),
    marker="embeddings.tok_embeddings",  # ModernBERT
    rules=(
        fused("c_attn", "k_proj", "v_proj", beside="q_attn"),
        fused("c_attn|qkv_proj|qkv_linear|Wqkv|qkv|W_pack|to_qkv|att_proj", *QKV, layout=layouts.query_key_value),
        fused("kv_proj|Wkv|to_kv|kv", "k_proj", "v_proj"),
        fused("gate_up_proj", *GATE_UP, layout=layouts.gate_up),
    ),
)
