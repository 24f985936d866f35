"""A LLaMA-like model small enough to train in milliseconds, under the names of Hugging Face."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

VOCAB, HIDDEN, INNER = 80, 64, 96
ROLES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ROLES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        return self.o_proj(functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyLlama(nn.Module):
    def __init__(self, layers: int = 2, *, tied: bool = False) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.model.layers = nn.ModuleList(Block() for _ in range(layers))
        self.model.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))


def build(layers: int = 2, *, seed: int = 0, tied: bool = False) -> TinyLlama:
    """A model whose modules have clearly different spectra."""
    torch.manual_seed(seed)
    model = TinyLlama(layers, tied=tied)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.ndim == 2:
                parameter.mul_(torch.logspace(0, -0.1 * (index % 11), parameter.shape[1]))
    return model


def loss(model: nn.Module, step: int, *, rank: int = 0, num_ranks: int = 1) -> torch.Tensor:
    """The loss on this rank's share of the batch of one step."""
    tokens = torch.randint(VOCAB, (8, 17), generator=torch.Generator().manual_seed(step))
    share = tokens.chunk(num_ranks)[rank]
    logits = model(share[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), share[:, 1:].flatten())


def assigned(layers: int = 2) -> list[str]:
    """Names of the parameters that get a decay of their own."""
    return [f"model.layers.{layer}.{role}.weight" for layer in range(layers) for role in ROLES]
