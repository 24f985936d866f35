"""ModernBERT: the prediction head stands at the root, under names that mean something else elsewhere."""

from __future__ import annotations

from esdtool.modules.reasons import LM_HEAD
from esdtool.modules.rules import Family, skip

FAMILY = Family(
    name="modernbert",
    model_types=frozenset({"modernbert"}),
    marker="embeddings.tok_embeddings",
    rules=(
        skip("^decoder", LM_HEAD),
        skip("^head.dense", LM_HEAD),
    ),
)
