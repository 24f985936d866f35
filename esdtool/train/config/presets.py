"""Model sizes by name: the LLaMAs of the AlphaDecay paper and small ones for a laptop. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A LLaMA architecture: RMS norm with epsilon 1e-6, SwiGLU, rotary positions, untied lm_head."""

    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the MLP."""
    num_attention_heads: int
    """Attention heads; every head has its own keys and values."""
    num_hidden_layers: int
    """Transformer blocks."""
    vocab_size: int | None = None
    """Rows of the embedding; None: as many as the tokenizer has tokens."""
    max_position_embeddings: int = 2048
    """Longest sequence."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMS norm."""
    initializer_range: float = 0.02
    """Standard deviation of the normal distribution that matrices start from."""


# Sizes of the paper: AlphaDecay (arXiv 2506.14562), the LLaMA family of GaLore (arXiv 2403.03507). The authors' LLR
# (arXiv 2605.22297) has the same but for the smallest, which is llama-60m-wide.
# The small ones keep head width 32 or 64 and hidden >= 128, so that every module has at least 128 eigenvalues;
# the number in the name counts the transformer blocks and not the embeddings, which depend on the tokenizer.
PRESETS: Final = MappingProxyType(
    {
        "llama-1m": Preset(hidden_size=128, intermediate_size=344, num_attention_heads=4, num_hidden_layers=4),
        "llama-3m": Preset(hidden_size=256, intermediate_size=688, num_attention_heads=4, num_hidden_layers=4),
        "llama-5m": Preset(hidden_size=256, intermediate_size=688, num_attention_heads=4, num_hidden_layers=6),
        "llama-11m": Preset(hidden_size=384, intermediate_size=1024, num_attention_heads=6, num_hidden_layers=6),
        "llama-60m": Preset(
            hidden_size=512, intermediate_size=1376, num_attention_heads=8, num_hidden_layers=8, vocab_size=32000
        ),
        "llama-60m-wide": Preset(
            hidden_size=768, intermediate_size=1512, num_attention_heads=12, num_hidden_layers=6, vocab_size=32000
        ),
        "llama-130m": Preset(
            hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_hidden_layers=12, vocab_size=32000
        ),
        "llama-350m": Preset(
            hidden_size=1024, intermediate_size=2736, num_attention_heads=16, num_hidden_layers=24, vocab_size=32000
        ),
        "llama-1b": Preset(
            hidden_size=2048, intermediate_size=5461, num_attention_heads=32, num_hidden_layers=24, vocab_size=32000
        ),
    }
)
