"""Mixtures of experts: every expert's projections, whether its checkpoint stacks them or stores them one by one.

What gate and up are is not read off the tensors here: the model's own experts are run on the identity matrix. Their
activation function shows what reaches it (the gate), and a `down_proj` that passes everything through shows the rest.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import esdtool
from esdtool.analysis.document import Analysis
from tests.modules.families import oracle
from tests.modules.families.oracle import assert_whole, random_model

Matrices = dict[str, torch.Tensor]
Renames = Mapping[str, str]

HIDDEN, INTERMEDIATE, EXPERTS = 24, 20, 4
COMMON: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ROLES = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "o_proj",
    "out_proj": "o_proj",
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
    "output_linear": "down_proj",
}
"""Role of a module by the last segment of its name."""


# Vectors are 0: the probes below must not see biases.
build = functools.partial(random_model, zeroed=lambda name: True)


def linears(model: nn.Module, *left_out: str) -> Matrices:
    """Weights of the model's Linear layers, without output head and routers, and those that end as in `left_out`."""
    ends = ("lm_head", "router", "router.layer", "shared_expert_gate", *left_out)
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(ends)
    }


def check_layouts(
    model: Any, tmp_path: Path, expected: Matrices, *, in_files: Renames, routers: Mapping[str, str]
) -> Analysis:
    """Check `expected` against the model as it is in memory, and against the files that it writes.

    Args:
        model: the live model.
        tmp_path: an empty folder.
        expected: module name and matrix as the live model names them.
        in_files: patterns and replacements that turn a live name into the one in the files.
        routers: name of a router's weight in the live model, and in the files.

    Returns:
        The analysis of the live layout.
    """
    saved, live = oracle.check_layouts(model, tmp_path, expected, in_files=in_files)
    for analysis, names in ((saved, routers.values()), (live, routers.keys())):
        reasons = {tensor.name: tensor.reason for tensor in analysis.skipped}
        for name in names:
            assert "router" in reasons[name]
        for module in analysis.modules:
            assert module.role == ROLES[module.name.rpartition(".")[2]], module.name
            number = re.search(r"\bexperts\.(?:mlp\.)?(\d+)\.", module.name)
            assert module.expert == (int(number[1]) if number else None), module.name
    return live


@contextmanager
def replaced(parameter: nn.Parameter, values: torch.Tensor) -> Iterator[None]:
    """Other values in a parameter, for a while."""
    kept = parameter.detach().clone()
    parameter.data.copy_(values)
    yield
    parameter.data.copy_(kept)


class Tap(nn.Module):
    """Stands for an activation function: keeps what it is given, and gives ones, so that gate * up is up."""

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        self.gate = gate
        return torch.ones_like(gate)


@contextmanager
def tapped(module: nn.Module, activation: str) -> Iterator[Tap]:
    kept = getattr(module, activation)
    tap = Tap()
    setattr(module, activation, tap)
    yield tap
    setattr(module, activation, kept)


def only(expert: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, weights), both [rows, 1], of a router that sends every row to one expert."""
    return torch.full((rows, 1), expert), torch.ones(rows, 1)


@torch.no_grad()
def experts_of(experts: nn.Module, name: str) -> Matrices:
    """Projections of the experts of a class with `forward(hidden_states, top_k_index, top_k_weights)`.

    Such a class is MixtralExperts (modeling_mixtral.py); the other families' are made after it. In its forward,
    `gate, up = linear(x, gate_up_proj[expert]).chunk(2, dim=-1)`, then `linear(act_fn(gate) * up, down_proj[expert])`.
    """
    experts.config._experts_implementation = "eager"  # the code that one can read
    matrices = {}
    for expert in range(EXPERTS):
        passing = torch.eye(HIDDEN, INTERMEDIATE).expand_as(experts.down_proj)
        with tapped(experts, "act_fn") as tap, replaced(experts.down_proj, passing):
            up = experts(torch.eye(HIDDEN), *only(expert, HIDDEN))[:, :INTERMEDIATE].T
        gate, down = tap.gate.T, experts.down_proj[expert]
        assert_whole(experts.gate_up_proj[expert], gate, up)
        matrices |= named(name, expert, gate=gate, up=up, down=down)
    return matrices


def named(name: str, expert: int, *, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Matrices:
    return {
        f"{name}.{expert}.gate_proj": gate,
        f"{name}.{expert}.up_proj": up,
        f"{name}.{expert}.down_proj": down.detach(),
    }


def with_experts(model: nn.Module) -> Matrices:
    """All modules of a model whose layers have nothing in common tensors but their experts."""
    matrices = linears(model)
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            matrices |= experts_of(module, name)
    return matrices


def mixtral() -> Any:
    return build(
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig(**COMMON, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS),
    )


def qwen2_moe() -> Any:
    config = transformers.Qwen2MoeConfig(
        **COMMON,
        intermediate_size=28,
        moe_intermediate_size=INTERMEDIATE,
        shared_expert_intermediate_size=36,
        num_experts=EXPERTS,
    )
    return build(transformers.Qwen2MoeForCausalLM, config)


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        **(COMMON | {"num_hidden_layers": 2}),
        head_dim=10,
        intermediate_size=28,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        mlp_only_layers=[0],
    )
    return build(transformers.Qwen3MoeForCausalLM, config)


def olmoe() -> Any:
    config = transformers.OlmoeConfig(**COMMON, intermediate_size=INTERMEDIATE, num_experts=EXPERTS)
    return build(transformers.OlmoeForCausalLM, config)


def granitemoe() -> Any:
    config = transformers.GraniteMoeConfig(**COMMON, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    return build(transformers.GraniteMoeForCausalLM, config)


def phimoe() -> Any:
    config = transformers.PhimoeConfig(**COMMON, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    return build(transformers.PhimoeForCausalLM, config)


def glm4_moe() -> Any:
    config = transformers.Glm4MoeConfig(
        **(COMMON | {"num_hidden_layers": 2}),
        head_dim=10,
        intermediate_size=28,
        moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        first_k_dense_replace=1,
    )
    return build(transformers.Glm4MoeForCausalLM, config)


def ernie4_5_moe() -> Any:
    settings = COMMON | {"num_hidden_layers": 2}
    del settings["num_experts_per_tok"]
    config = transformers.Ernie4_5_MoeConfig(
        **settings,
        intermediate_size=28,
        moe_intermediate_size=INTERMEDIATE,
        moe_num_experts=EXPERTS,
        moe_num_shared_experts=2,
        moe_k=2,
        moe_layer_start_index=1,
    )
    return build(transformers.Ernie4_5_MoeForCausalLM, config)


BLOCK = "model.layers.0"
AS_MIXTRAL = {
    r"\.mlp\.experts\.": ".block_sparse_moe.experts.",
    r"(experts\.\d+)\.gate_proj": r"\1.w1",
    r"(experts\.\d+)\.up_proj": r"\1.w3",
    r"(experts\.\d+)\.down_proj": r"\1.w2",
}
FAMILIES: dict[str, tuple[Callable[[], Any], Renames, Mapping[str, str]]] = {
    # model, names in its files, routers
    "mixtral": (
        mixtral,
        AS_MIXTRAL,
        {f"{BLOCK}.mlp.gate.weight": f"{BLOCK}.block_sparse_moe.gate.weight"},
    ),
    "qwen2_moe": (
        qwen2_moe,
        {},
        {
            f"{BLOCK}.mlp.gate.weight": f"{BLOCK}.mlp.gate.weight",
            f"{BLOCK}.mlp.shared_expert_gate.weight": f"{BLOCK}.mlp.shared_expert_gate.weight",
        },
    ),
    "qwen3_moe": (qwen3_moe, {}, {"model.layers.1.mlp.gate.weight": "model.layers.1.mlp.gate.weight"}),
    "olmoe": (olmoe, {}, {f"{BLOCK}.mlp.gate.weight": f"{BLOCK}.mlp.gate.weight"}),
    # Its files hold `block_sparse_moe.input_linear.weight` and `output_linear.weight`, [experts, ., .].
    "granitemoe": (
        granitemoe,
        {},
        {f"{BLOCK}.block_sparse_moe.router.weight": f"{BLOCK}.block_sparse_moe.router.layer.weight"},
    ),
    "phimoe": (
        phimoe,
        AS_MIXTRAL,
        {f"{BLOCK}.mlp.router.weight": f"{BLOCK}.block_sparse_moe.gate.weight"},
    ),
    "glm4_moe": (glm4_moe, {}, {"model.layers.1.mlp.gate.weight": "model.layers.1.mlp.gate.weight"}),
    "ernie4_5_moe": (ernie4_5_moe, {}, {"model.layers.1.mlp.gate.weight": "model.layers.1.mlp.gate.weight"}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_mixtral_s_kind(family: str, tmp_path: Path) -> None:
    make, in_files, routers = FAMILIES[family]
    model = make()
    expected = with_experts(model)
    live = check_layouts(model, tmp_path, expected, in_files=in_files, routers=routers)
    of_experts = [module for module in live.modules if module.expert is not None]
    assert len(of_experts) == 3 * EXPERTS
    assert {(module.role, module.expert) for module in of_experts} == {
        (role, expert) for role in ("gate_proj", "up_proj", "down_proj") for expert in range(EXPERTS)
    }


def test_granitemoeshared(tmp_path: Path) -> None:
    """Beside the experts a dense MLP, whose `input_linear` is like theirs, but of two dimensions."""
    config = transformers.GraniteMoeSharedConfig(
        **COMMON, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, shared_intermediate_size=28
    )
    model = build(transformers.GraniteMoeSharedForCausalLM, config)
    expected = with_experts(model)
    name = f"{BLOCK}.shared_mlp"
    shared = model.get_submodule(name)
    fused, down = expected.pop(f"{name}.input_linear"), expected[f"{name}.output_linear"]
    # GraniteMoeSharedMLP.forward: activation(chunks[0]) * chunks[1] of input_linear's output goes to output_linear.
    seen = []
    hook = shared.output_linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), tapped(shared, "activation") as tap:
        shared(torch.eye(HIDDEN))
    hook.remove()
    expected |= {f"{name}.gate_proj": tap.gate.T, f"{name}.up_proj": seen[0].T}
    assert_whole(fused, tap.gate, seen[0])
    assert down.shape == (HIDDEN, 28)
    routers = {f"{BLOCK}.block_sparse_moe.router.weight": f"{BLOCK}.block_sparse_moe.router.layer.weight"}
    check_layouts(model, tmp_path, expected, in_files={}, routers=routers)


def test_the_files_hold_what_the_tests_say(tmp_path: Path) -> None:
    """The layouts that are tested are those that one meets: stacked in memory, and by expert or stacked in files."""
    from safetensors import safe_open

    seen = {}
    for family in ("mixtral", "qwen2_moe", "granitemoe"):
        FAMILIES[family][0]().save_pretrained(tmp_path / family)
        with safe_open(tmp_path / family / "model.safetensors", framework="pt") as file:
            seen[family] = set(file.keys())
    assert f"{BLOCK}.block_sparse_moe.experts.3.w1.weight" in seen["mixtral"]
    assert f"{BLOCK}.mlp.experts.3.gate_proj.weight" in seen["qwen2_moe"]
    assert f"{BLOCK}.block_sparse_moe.input_linear.weight" in seen["granitemoe"]
    assert f"{BLOCK}.mlp.experts.gate_up_proj" in mixtral().state_dict()


def test_names_of_one_expert_of_each_layout(tmp_path: Path) -> None:
    """Spelt out once, so that no helper above can be wrong in the same way as the code."""
    model = mixtral()
    model.save_pretrained(tmp_path)
    live = {module.name: module for module in esdtool.analyze(model, min_eigs=2).modules}
    module = live["model.layers.0.mlp.experts.3.gate_proj"]
    assert (module.role, module.expert, module.layer) == ("gate_proj", 3, 0)
    assert module.parameter == "model.layers.0.mlp.experts.gate_up_proj"
    assert module.shape == (INTERMEDIATE, HIDDEN)
    assert module.stored_shape == (EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    saved = {module.name: module for module in esdtool.analyze(tmp_path, min_eigs=2).modules}
    module = saved["model.layers.0.block_sparse_moe.experts.3.w1"]
    assert (module.role, module.expert, module.layer) == ("gate_proj", 3, 0)
    assert module.parameter == "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    assert module.parameter_shape is None


@torch.no_grad()
def jetmoe_matrices(model: nn.Module) -> Matrices:
    """Matrices of JetMoE, whose attention is a mixture of query and output projections as well."""

    class Everything(nn.Module):
        """A router that sends everything to one expert: see JetMoeTopKGating.forward for what it returns."""

        def __init__(self, expert: int) -> None:
            super().__init__()
            self.expert = expert

        def forward(self, rows: torch.Tensor) -> tuple[Any, ...]:
            everything = torch.arange(len(rows))
            sizes = [len(rows) if expert == self.expert else 0 for expert in range(EXPERTS)]
            return everything, everything, torch.ones(len(rows)), sizes, None

    matrices = {}
    layer = model.model.layers[0]
    mlp, attention = layer.mlp, layer.self_attention
    keep = mlp.router, attention.experts.router, attention.experts.top_k
    attention.experts.top_k = 1
    for expert in range(EXPERTS):
        mlp.router = attention.experts.router = Everything(expert)
        # JetMoeMoE.forward: activation(chunks[0]) * chunks[1] of input_linear's output goes to output_linear.
        passing = torch.eye(HIDDEN, INTERMEDIATE).expand_as(mlp.output_linear.weight)
        with tapped(mlp, "activation") as tap, replaced(mlp.output_linear.weight, passing):
            up = mlp(torch.eye(HIDDEN)[None])[0, :, :INTERMEDIATE].T
        assert_whole(mlp.input_linear.weight[expert], tap.gate.T, up)
        name = "model.layers.0.mlp.experts"
        matrices |= named(name, expert, gate=tap.gate.T, up=up, down=mlp.output_linear.weight[expert])
        # JetMoeMoA.map and .reduce: before and after the attention itself.
        query, _, _ = attention.experts.map(torch.eye(HIDDEN)[None])
        width = query.shape[-1]
        sizes = [width if other == expert else 0 for other in range(EXPERTS)]
        everything = torch.arange(width)
        topology = everything, everything, torch.ones(width), sizes
        output = attention.experts.reduce(torch.eye(width)[None, :, None], topology)[0]
        matrices[f"model.layers.0.self_attention.experts.{expert}.q_proj"] = query[0, :, 0].T
        matrices[f"model.layers.0.self_attention.experts.{expert}.o_proj"] = output.T
    mlp.router, attention.experts.router, attention.experts.top_k = keep
    # JetMoeAttention.forward: key_states, value_states = self.kv_proj(hidden_states).chunk(2, dim=-1)
    keys, values = attention.kv_proj(torch.eye(HIDDEN)).chunk(2, dim=-1)
    matrices["model.layers.0.self_attention.k_proj"] = keys.T
    matrices["model.layers.0.self_attention.v_proj"] = values.T
    return matrices


def test_jetmoe(tmp_path: Path) -> None:
    settings = COMMON | {"num_key_value_heads": 3}
    del settings["num_attention_heads"]  # it follows from the others
    config = transformers.JetMoeConfig(
        **settings, kv_channels=10, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS
    )
    model = build(transformers.JetMoeForCausalLM, config)
    routers = [
        "model.layers.0.mlp.router.layer.weight",
        "model.layers.0.self_attention.experts.router.layer.weight",
    ]
    check_layouts(
        model, tmp_path, jetmoe_matrices(model), in_files={}, routers=dict(zip(routers, routers, strict=True))
    )


def llama4() -> Any:
    config = transformers.Llama4TextConfig(
        **(COMMON | {"num_hidden_layers": 2, "num_experts_per_tok": 1}),
        head_dim=10,
        intermediate_size=INTERMEDIATE,
        intermediate_size_mlp=28,
        num_local_experts=EXPERTS,
        interleave_moe_layer_step=2,
    )
    return build(transformers.Llama4ForCausalLM, config)


def llama4_matrices(model: nn.Module) -> Matrices:
    experts = model.model.layers[1].feed_forward.experts
    matrices = linears(model)
    # Llama4TextExperts.forward: bmm(x, gate_up_proj), chunk(2, dim=-1) -> bmm(up * act_fn(gate), down_proj)
    passing = torch.eye(INTERMEDIATE, HIDDEN).expand_as(experts.down_proj)
    with torch.no_grad(), tapped(experts, "act_fn") as tap, replaced(experts.down_proj, passing):
        up = experts(torch.eye(HIDDEN).repeat(EXPERTS, 1)).reshape(EXPERTS, HIDDEN, HIDDEN)[:, :, :INTERMEDIATE]
    for expert in range(EXPERTS):
        assert_whole(experts.gate_up_proj[expert], tap.gate[expert], up[expert])
        matrices |= named(
            "model.layers.1.feed_forward.experts",
            expert,
            gate=tap.gate[expert].T,
            up=up[expert].T,
            down=experts.down_proj[expert].T,
        )
    return matrices


def test_llama4(tmp_path: Path) -> None:
    """Experts [experts, in, out], the other way round than everywhere else; the first layer is dense."""
    model = llama4()
    matrices = llama4_matrices(model)
    router = "model.layers.1.feed_forward.router.weight"
    live = check_layouts(model, tmp_path, matrices, in_files={}, routers={router: router})
    assert {module.layer for module in live.modules if module.expert is not None} == {1}


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(**COMMON, head_dim=10, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    return build(transformers.GptOssForCausalLM, config)


def gpt_oss_columns(experts: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Which columns of `gate_up_proj` are gates, and which are ups, in the order of `down_proj`'s rows.

    GptOssExperts._apply_gate makes (up + 1) * gate * sigmoid(alpha * gate) of them, up to limits. With alpha = 0 and
    no limit that is (up + 1) * gate / 2: a unit vector gives something only where it is a gate, and added to ones at
    all gates it shows which up belongs to which of them.
    """
    experts.alpha, experts.limit = 0.0, float("inf")
    units = torch.eye(2 * INTERMEDIATE)
    answers = experts._apply_gate(units)  # [column, intermediate]
    gates = answers.argmax(dim=0)
    all_gates = units[gates].sum(dim=0)
    answers = experts._apply_gate(all_gates + units) - experts._apply_gate(all_gates)
    answers[gates] = 0
    return gates, answers.argmax(dim=0)


@torch.no_grad()
def gpt_oss_matrices(model: nn.Module) -> Matrices:
    experts = model.model.layers[0].mlp.experts
    gates, ups = gpt_oss_columns(experts)
    assert sorted([*gates.tolist(), *ups.tolist()]) == list(range(2 * INTERMEDIATE))
    assert gates.tolist() == list(range(0, 2 * INTERMEDIATE, 2))
    matrices = linears(model)
    for expert in range(EXPERTS):
        # GptOssExperts.forward: x @ gate_up_proj[expert], _apply_gate, @ down_proj[expert]
        fused = experts.gate_up_proj[expert]
        matrices |= named(
            "model.layers.0.mlp.experts",
            expert,
            gate=fused[:, gates].T,
            up=fused[:, ups].T,
            down=experts.down_proj[expert].T,
        )
    return matrices


def test_gpt_oss(tmp_path: Path) -> None:
    """Gate and up alternate column by column; every expert's bias is a row of a matrix that is none."""
    model = gpt_oss()
    router = "model.layers.0.mlp.router.weight"
    live = check_layouts(model, tmp_path, gpt_oss_matrices(model), in_files={}, routers={router: router})
    reasons = {tensor.name: tensor.reason for tensor in live.skipped}
    assert "bias" in reasons["model.layers.0.mlp.experts.gate_up_proj_bias"]
    assert "bias" in reasons["model.layers.0.mlp.experts.down_proj_bias"]


class Recording:
    """Stands for a cache: keeps the keys and values that an attention layer would store."""

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = keys, values
        return keys, values


def by_rows(states: torch.Tensor) -> torch.Tensor:
    """[1, heads, inputs, head_dim] that identity inputs gave: the projection's matrix [heads * head_dim, inputs]."""
    return states[0].transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def dbrx_matrices(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Matrices:
    from transformers.models.dbrx import modeling_dbrx

    block = model.transformer.blocks[0]
    attention, experts = block.norm_attn_norm.attn, block.ffn.experts
    attention.clip_qkv = float("inf")
    cache, rotated = Recording(), []
    # transformers 5.24 renamed the argument.
    cached = "cache" if "cache" in inspect.signature(attention.forward).parameters else "past_key_values"

    def unrotated(query: torch.Tensor, key: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rotated.append(query)
        return query, key

    with monkeypatch.context() as patch:
        patch.setattr(modeling_dbrx, "apply_rotary_pos_emb", unrotated)
        attention(torch.eye(HIDDEN)[None], position_embeddings=(None, None), **{cached: cache})
    name = "transformer.blocks.0.norm_attn_norm.attn"
    matrices = {
        f"{name}.q_proj": by_rows(rotated[0]),
        f"{name}.k_proj": by_rows(cache.keys),
        f"{name}.v_proj": by_rows(cache.values),
        f"{name}.out_proj": attention.out_proj.weight,
    }
    assert_whole(attention.Wqkv.weight, *list(matrices.values())[:3])

    mlp = experts.mlp
    count = mlp.moe_num_experts
    for expert in range(count):
        # DbrxExpertGLU.forward: (activation_fn(x w1^T) * (x v1^T)) w2
        passing = torch.eye(INTERMEDIATE, HIDDEN).repeat(count, 1)
        with tapped(mlp, "activation_fn") as tap, replaced(mlp.w2, passing):
            up = experts(torch.eye(HIDDEN)[None], *only(expert, HIDDEN))[0, :, :INTERMEDIATE].T
        # DbrxExperts.forward: w2.view(-1, ffn_hidden_size, hidden_size)[expert]
        down = mlp.w2.view(-1, INTERMEDIATE, HIDDEN)[expert].T
        matrices |= named("transformer.blocks.0.ffn.experts.mlp", expert, gate=tap.gate.T, up=up, down=down)
    assert_whole(mlp.w1, *(matrix for name, matrix in matrices.items() if "gate_proj" in name))
    assert_whole(mlp.v1, *(matrix for name, matrix in matrices.items() if "up_proj" in name))
    return matrices


def test_dbrx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts stacked along the rows: [experts * ffn, hidden], three tensors of two dimensions."""
    config = transformers.DbrxConfig(
        d_model=HIDDEN,
        n_heads=4,
        n_layers=1,
        max_seq_len=32,
        vocab_size=50,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={
            "ffn_hidden_size": INTERMEDIATE,
            "hidden_size": HIDDEN,
            "moe_num_experts": 5,
            "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
        },
    )
    model = build(transformers.DbrxForCausalLM, config)
    router = "transformer.blocks.0.ffn.router.layer.weight"
    matrices = dbrx_matrices(model, monkeypatch)
    assert len(matrices) == 4 + 3 * 5
    check_layouts(model, tmp_path, matrices, in_files={}, routers={router: router})


@pytest.mark.parametrize(
    ("make", "matrices_of", "kept"),
    [
        # gate and up alternate, which neither `self_attn.sinks` nor a model_type tells here
        (gpt_oss, gpt_oss_matrices, r"\.experts\."),
        # [experts, in, 2 * out], which no `down_proj` tells here
        (llama4, llama4_matrices, r"\.experts\.gate_up_proj"),
        (mixtral, with_experts, r"\.experts\.gate_up_proj"),
    ],
    ids=["gpt_oss", "llama4", "mixtral"],
)
def test_a_part_of_a_model_is_never_cut_at_a_guess(
    make: Callable[[], Any], matrices_of: Callable[[nn.Module], Matrices], kept: str
) -> None:
    """Some tensors of a model, and no config.json: each module is right, or left out with a reason."""
    model = make()
    expected = matrices_of(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if re.search(kept, name)}
    padding = {"padding.0.mlp.fc1.weight": torch.randn(6, 5)}  # something to analyse in any case
    analysis = esdtool.analyze(tensors | padding, min_eigs=2, jobs=1)
    scored = [module for module in analysis.modules if module.name != "padding.0.mlp.fc1"]
    for module in scored:
        singular = np.linalg.svd(expected[module.name].double().numpy(), compute_uv=False)
        found = np.sqrt(analysis.esds[module.name])
        assert found.shape == singular.shape, module.name
        np.testing.assert_allclose(found, np.sort(singular), rtol=0, atol=1e-5 * singular.max(), err_msg=module.name)
    reasons = {tensor.name: tensor.reason for tensor in analysis.skipped}
    assert tensors.keys() <= {module.parameter for module in scored} | reasons.keys()
    assert all(reasons.values())


@pytest.mark.parametrize("make", [mixtral, llama4, gpt_oss])
def test_unsplit_experts_stay_apart(make: Callable[[], Any]) -> None:
    """`split_fused=False` keeps gate and up together, but never the matrices of two experts."""
    model = make()
    analysis = esdtool.analyze(model, min_eigs=2, jobs=1, split_fused=False)
    stacks = {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim == 3}
    assert len(stacks) == 2
    expected = {
        name.replace(".experts.", f".experts.{expert}."): stack[expert]
        for name, stack in stacks.items()
        for expert in range(EXPERTS)
    }
    modules = {module.name: module for module in analysis.modules if module.expert is not None}
    assert modules.keys() == expected.keys()
    for name, matrix in expected.items():
        singular = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        np.testing.assert_allclose(np.sqrt(analysis.esds[name]), np.sort(singular), rtol=1e-6, atol=1e-6)
        assert modules[name].role == name.rpartition(".")[2]
        assert f".experts.{modules[name].expert}." in name


def test_stacked_and_single_experts_give_the_same(tmp_path: Path) -> None:
    """The same weights in memory (stacked) and in files (one by one): the same eigenvalues, role by role."""
    model = phimoe()
    model.save_pretrained(tmp_path)
    stacked, single = (esdtool.analyze(source, min_eigs=2, jobs=1) for source in (model, tmp_path))

    def by_place(analysis: Analysis) -> dict[tuple[Any, ...], np.ndarray]:
        return {(m.layer, m.expert, m.role): analysis.esds[m.name] for m in analysis.modules}

    one, other = by_place(stacked), by_place(single)
    assert one.keys() == other.keys()
    for place, eigenvalues in one.items():
        np.testing.assert_allclose(eigenvalues, other[place], rtol=1e-9, err_msg=str(place))
