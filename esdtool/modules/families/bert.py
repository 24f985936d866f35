"""BERT and its kin: RoBERTa, MiniLM, ELECTRA, ALBERT, DeBERTa, LayoutLM, and HF's ViT before transformers 5."""

from __future__ import annotations

from esdtool.modules.rules import Family, score

FAMILY = Family(
    name="bert",
    rules=(
        score("attention|crossattention.self|attention.query", "q_proj"),
        score("attention|crossattention.self|attention.key", "k_proj"),
        score("attention|crossattention.self|attention.value", "v_proj"),
        score("attention|crossattention.output.dense", "o_proj"),
        score("bottleneck.attention|input.dense", "bottleneck"),  # MobileBERT
        score("output.bottleneck.dense", "bottleneck"),
        score("intermediate|intermediate_query.dense", "up_proj"),
        score("feed_forward.dense.dense", "up_proj"),  # Reformer
        score("output|output_query.dense", "down_proj"),
        score("albert_layers.#.ffn", "up_proj"),
        score("albert_layers.#.ffn_output", "down_proj"),
        # Linear maps beside the embeddings whose names would pass for an embedding.
        score("embedding_hidden_mapping_in", "embedding_hidden_mapping_in"),
        score("embeddings_project", "embeddings_project"),
        score("pooler.dense", "pooler"),
    ),
)
