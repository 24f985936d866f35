"""ModernBERT: the prediction head stands at the root, under names that mean something else elsewhere."""

from __future__ import annotations

from esdtool.modules.rules import Family, skip

FAMILY = Family(
    name="modernbert",
    model_types=frozenset({"modernbert"}),
    marker="embeddings.tok_embeddings",
    rules=(
        skip("^decoder", "language-model head"),
        skip("^head.dense", "language-model head"),
    ),
)
