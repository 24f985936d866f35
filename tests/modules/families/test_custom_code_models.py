"""Models whose code comes with their checkpoints and not with transformers.

Each is written here as a small module with the names, shapes and forward of the public one. The parts expected of a
fused projection are read off that forward, which is run on basis vectors: what it calls query, key, value, gate and
up is recorded, and nothing is cut apart by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from torch import nn

import esdtool
from esdtool.checkpoint import from_state_dict
from tests.modules.families.oracle import check, roles

Matrices = dict[str, torch.Tensor]

HIDDEN, HEADS, GROUPS, INNER, VOCABULARY = 24, 4, 2, 20, 50
WIDTH = HIDDEN // HEADS


class Recorder(nn.Module):
    """A block that says what its projections are: `parts` has role and values of the last forward."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, torch.Tensor] = {}

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention over [tokens, heads, width]; keys and values may have fewer heads."""
        self.parts |= {"q_proj": query, "k_proj": key, "v_proj": value}
        repeats = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
        states = (states.transpose(0, 1) for states in (query, key, value))
        return F.scaled_dot_product_attention(*states, is_causal=True).transpose(0, 1).flatten(1)

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """SwiGLU: the gate goes through the activation."""
        self.parts |= {"gate_proj": gate, "up_proj": up}
        return F.silu(gate) * up

    def matrices(self, prefix: str) -> Matrices:
        """Matrix [rows, hidden] by name, from a forward of each basis vector as one token."""
        with torch.no_grad():
            self(torch.eye(HIDDEN))
        return {f"{prefix}.{role}": states.reshape(HIDDEN, -1).T for role, states in self.parts.items()}


class BaichuanAttention(Recorder):
    """Queries, keys and values of all heads one after the other in `W_pack`."""

    def __init__(self) -> None:
        super().__init__()
        self.W_pack = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.W_pack(hidden).unflatten(-1, (3, HEADS, WIDTH)).unbind(1)
        return self.o_proj(self.attend(query, key, value))


class LlamaMlp(Recorder):
    """Three matrices under LLaMA's names."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gated(self.gate_proj(hidden), self.up_proj(hidden)))


class InternLM2Attention(Recorder):
    """`wqkv` by key-value head: the queries that share it, then its key, then its value."""

    def __init__(self, groups: int = GROUPS) -> None:
        super().__init__()
        self.groups = groups
        self.wqkv = nn.Linear(HIDDEN, (HEADS + 2 * groups) * WIDTH, bias=False)
        self.wo = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        grouped = self.wqkv(hidden).unflatten(-1, (self.groups, HEADS // self.groups + 2, WIDTH))
        query, key, value = grouped[:, :, :-2].flatten(1, 2), grouped[:, :, -2], grouped[:, :, -1]
        return self.wo(self.attend(query, key, value))


class InternLM2Mlp(Recorder):
    """`w1` is the gate, `w3` the other half, `w2` the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, INNER, bias=False)
        self.w3 = nn.Linear(HIDDEN, INNER, bias=False)
        self.w2 = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.w2(self.gated(self.w1(hidden), self.w3(hidden)))


class ChatGLMAttention(Recorder):
    """ChatGLM2 and 3: all queries, then the keys of the groups, then their values.

    Without multi-query attention these models go head by head, each with its query, key and value.
    """

    def __init__(self, groups: int | None = GROUPS) -> None:
        super().__init__()
        self.groups = groups
        rows = 3 * HIDDEN if groups is None else HIDDEN + 2 * groups * WIDTH
        self.query_key_value = nn.Linear(HIDDEN, rows, bias=False)
        self.dense = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        mixed = self.query_key_value(hidden)
        if self.groups is None:
            query, key, value = mixed.unflatten(-1, (HEADS, 3 * WIDTH)).chunk(3, dim=-1)
        else:
            sizes = (HIDDEN, self.groups * WIDTH, self.groups * WIDTH)
            query, key, value = (part.unflatten(-1, (-1, WIDTH)) for part in mixed.split(sizes, dim=-1))
        return self.dense(self.attend(query, key, value))


class ChatGLMMlp(Recorder):
    """Gate, then up, in `dense_h_to_4h`."""

    def __init__(self) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(HIDDEN, 2 * INNER, bias=False)
        self.dense_4h_to_h = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self.gated(*self.dense_h_to_4h(hidden).chunk(2, dim=-1)))


class PlainMlp(Recorder):
    """The first ChatGLM's: no gate."""

    def __init__(self) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.dense_4h_to_h = nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden)))


class QwenAttention(Recorder):
    """The first Qwen: thirds, in a Linear of GPT-2's name."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.c_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        nn.init.zeros_(self.c_attn.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        thirds = self.c_attn(hidden).split(HIDDEN, dim=-1)
        return self.c_proj(self.attend(*(part.unflatten(-1, (HEADS, WIDTH)) for part in thirds)))


class QwenMlp(Recorder):
    """`w2` goes through the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, INNER, bias=False)
        self.w2 = nn.Linear(HIDDEN, INNER, bias=False)
        self.c_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.gated(self.w2(hidden), self.w1(hidden)))


class OlmoBlock(Recorder):
    """OLMo's own format: a whole block; `ff_proj` has the linear half first, and the activated one second."""

    def __init__(self, groups: int = HEADS) -> None:
        super().__init__()
        self.sizes = (HIDDEN, groups * WIDTH, groups * WIDTH)
        self.att_proj = nn.Linear(HIDDEN, sum(self.sizes), bias=False)
        self.attn_out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.ff_proj = nn.Linear(HIDDEN, 2 * INNER, bias=False)
        self.ff_out = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        parts = (part.unflatten(-1, (-1, WIDTH)) for part in self.att_proj(hidden).split(self.sizes, dim=-1))
        attended = self.attn_out(self.attend(*parts))
        linear, gate = self.ff_proj(hidden).chunk(2, dim=-1)
        return attended + self.ff_out(self.gated(gate, linear))


def nested(path: str, module: nn.Module) -> nn.Module:
    """A module that has the given one under a dotted path."""
    for segment in reversed(path.split(".")):
        outer = nn.Module()
        outer.add_module(segment, module)
        module = outer
    return module


def checkpoint(blocks: Mapping[str, Recorder], *, embedding: str, head: str) -> tuple[Matrices, Matrices]:
    """State dict of the blocks, and of a token embedding and a head; and name and matrix of every module expected."""
    generator = torch.Generator().manual_seed(0)
    tensors: Matrices = {
        embedding: torch.randn(VOCABULARY, HIDDEN, generator=generator),
        head: torch.randn(VOCABULARY, HIDDEN, generator=generator),
    }
    expected: Matrices = {}
    for path, block in blocks.items():
        with torch.no_grad():
            for weight in block.parameters():
                if weight.ndim > 1:
                    weight.normal_(generator=generator)
        parts = block.matrices(path)
        linears = {name: module.weight.detach() for name, module in block.named_children()}
        rows = {name: {tuple(row) for row in weight.tolist()} for name, weight in linears.items()}
        # A Linear all of whose rows are in the parts is these parts; the others are modules of their own.
        in_parts = {tuple(row) for part in parts.values() for row in part.tolist()}
        of_parts = {row for name in linears if rows[name] <= in_parts for row in rows[name]}
        assert of_parts == in_parts
        assert sum(len(part) for part in parts.values()) == len(in_parts)
        for name, weight in linears.items():
            if not rows[name] <= in_parts:
                expected[f"{path}.{name}"] = weight
            elif single := [part for part, matrix in parts.items() if torch.equal(matrix, weight)]:
                # Not fused: the module keeps its own name.
                expected[f"{path}.{name}"] = parts.pop(single[0])
        expected |= parts
        tensors |= nested(path, block).state_dict()
    return tensors, expected


LLAMA_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
}


def test_baichuan() -> None:
    tensors, expected = checkpoint(
        {"model.layers.0.self_attn": BaichuanAttention(), "model.layers.0.mlp": LlamaMlp()},
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
    )
    found = roles(check(tensors, expected, config={"model_type": "baichuan", **LLAMA_SIZES}))
    assert found == {name: name.rpartition(".")[2] for name in expected}
    assert len(found) == 7
    assert roles(check(tensors, expected)) == found  # plain thirds: their shape tells


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_internlm2(groups: int) -> None:
    attention, mlp = "model.layers.0.attention", "model.layers.0.feed_forward"
    tensors, expected = checkpoint(
        {attention: InternLM2Attention(groups), mlp: InternLM2Mlp()},
        embedding="model.tok_embeddings.weight",
        head="output.weight",
    )
    config = {"model_type": "internlm2", "num_key_value_heads": groups, **LLAMA_SIZES}
    assert roles(check(tensors, expected, config=config)) == {
        f"{attention}.q_proj": "q_proj",
        f"{attention}.k_proj": "k_proj",
        f"{attention}.v_proj": "v_proj",
        f"{attention}.wo": "o_proj",
        f"{mlp}.w1": "gate_proj",
        f"{mlp}.w3": "up_proj",
        f"{mlp}.w2": "down_proj",
    }


CHATGLM: dict[str, Any] = {
    "model_type": "chatglm",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "kv_channels": WIDTH,
    "ffn_hidden_size": INNER,
    "padded_vocab_size": VOCABULARY,
}


@pytest.mark.parametrize("groups", [1, 2, None])
def test_chatglm_2_and_3(groups: int | None) -> None:
    attention, mlp = "transformer.encoder.layers.0.self_attention", "transformer.encoder.layers.0.mlp"
    tensors, expected = checkpoint(
        {attention: ChatGLMAttention(groups), mlp: ChatGLMMlp()},
        embedding="transformer.embedding.word_embeddings.weight",
        head="transformer.output_layer.weight",
    )
    config = CHATGLM | {"multi_query_attention": groups is not None, "multi_query_group_num": groups or 2}
    assert roles(check(tensors, expected, config=config)) == {
        f"{attention}.q_proj": "q_proj",
        f"{attention}.k_proj": "k_proj",
        f"{attention}.v_proj": "v_proj",
        f"{attention}.dense": "o_proj",
        f"{mlp}.gate_proj": "gate_proj",
        f"{mlp}.up_proj": "up_proj",
        f"{mlp}.dense_4h_to_h": "down_proj",
    }


def test_the_first_chatglm() -> None:
    """Head by head: view(heads, 3 * width), then thirds of each."""
    attention, mlp = "transformer.layers.0.attention", "transformer.layers.0.mlp"
    tensors, expected = checkpoint(
        {attention: ChatGLMAttention(None), mlp: PlainMlp()},
        embedding="transformer.word_embeddings.weight",
        head="lm_head.weight",
    )
    config = {
        "model_type": "chatglm",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "inner_hidden_size": 4 * HIDDEN,
        "position_encoding_2d": True,
    }
    assert roles(check(tensors, expected, config=config)) == {
        f"{attention}.q_proj": "q_proj",
        f"{attention}.k_proj": "k_proj",
        f"{attention}.v_proj": "v_proj",
        f"{attention}.dense": "o_proj",
        f"{mlp}.dense_h_to_4h": "up_proj",
        f"{mlp}.dense_4h_to_h": "down_proj",
    }


@pytest.mark.parametrize("with_config", [True, False])
def test_the_first_qwen(with_config: bool) -> None:
    attention, mlp = "transformer.h.0.attn", "transformer.h.0.mlp"
    tensors, expected = checkpoint(
        {attention: QwenAttention(), mlp: QwenMlp()}, embedding="transformer.wte.weight", head="lm_head.weight"
    )
    config = {
        "model_type": "qwen",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "kv_channels": WIDTH,
        "intermediate_size": 2 * INNER,
    }
    assert roles(check(tensors, expected, config=config if with_config else None)) == {
        f"{attention}.q_proj": "q_proj",
        f"{attention}.k_proj": "k_proj",
        f"{attention}.v_proj": "v_proj",
        f"{attention}.c_proj": "o_proj",
        f"{mlp}.w1": "up_proj",
        f"{mlp}.w2": "gate_proj",
        f"{mlp}.c_proj": "down_proj",
    }


@pytest.mark.parametrize("groups", [1, 2, None])
def test_olmo(groups: int | None) -> None:
    block = "model.transformer.blocks.0"
    tensors, expected = checkpoint(
        {block: OlmoBlock(HEADS if groups is None else groups)},
        embedding="model.transformer.wte.weight",
        head="model.transformer.ff_out.weight",
    )
    config = {
        "model_type": "hf_olmo",
        "d_model": HIDDEN,
        "n_heads": HEADS,
        "n_kv_heads": groups,
        "mlp_hidden_size": 2 * INNER,
        "activation_type": "swiglu",
    }
    found = {
        f"{block}.q_proj": "q_proj",
        f"{block}.k_proj": "k_proj",
        f"{block}.v_proj": "v_proj",
        f"{block}.attn_out": "o_proj",
        f"{block}.gate_proj": "gate_proj",
        f"{block}.up_proj": "up_proj",
        f"{block}.ff_out": "down_proj",
    }
    assert roles(check(tensors, expected, config=config)) == found
    if groups is None:  # thirds, and names of one family
        assert roles(check(tensors, expected)) == found


@pytest.mark.parametrize("make", [InternLM2Attention, ChatGLMAttention, OlmoBlock])
def test_grouped_queries_are_not_cut_without_a_configuration(make: type[Recorder]) -> None:
    block = make(GROUPS)
    path = "model.layers.0.attention"
    tensors, _ = checkpoint({path: block}, embedding="model.embed_tokens.weight", head="lm_head.weight")
    analysis = esdtool.analyze(from_state_dict(tensors), min_eigs=2, jobs=1)
    names = {"wqkv", "query_key_value", "att_proj"}
    (reason,) = [tensor.reason for tensor in analysis.skipped if tensor.name.split(".")[-2] in names]
    assert reason.startswith("fused")
    assert "config.json" in reason
    assert not {module.role for module in analysis.modules} & {"q_proj", "k_proj", "v_proj"}
