"""Language models with fused projections: each of the parts has its own spectrum, as the model itself uses it.

See `conftest.py` for how the model tells; nothing here is cut by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import esdtool
from esdtool.checkpoint import from_state_dict
from tests.modules.families.oracle import check, linears, roles

Matrices = dict[str, torch.Tensor]

VOCABULARY = 50
HEADS = ("lm_head", "embed_out", "proj_out")
"""Output heads; they are no modules."""
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
"""Common to all configurations."""
GPT: dict[str, Any] = TOKENS | {"n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 16}
GQA: dict[str, Any] = TOKENS | {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MHA: dict[str, Any] = TOKENS | {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
FALCON: dict[str, Any] = TOKENS | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}

ROLES = {
    **{role: role for role in ("q_proj", "k_proj", "v_proj", "o_proj", "q_gate", "gate_proj", "up_proj", "down_proj")},
    **dict.fromkeys(("c_fc", "fc_in", "fc1", "dense_h_to_4h", "intermediate.dense", "mlp.in_proj"), "up_proj"),
    **dict.fromkeys(("fc_out", "fc2", "dense_4h_to_h", "mlp.c_proj", "mlp.Wo", "mlp.out_proj"), "down_proj"),
    **dict.fromkeys(("attn.c_proj", "attn.out_proj", "attn.Wo", "self_attn.dense"), "o_proj"),
    **dict.fromkeys(("attention.dense", "self_attention.dense", "attention.output.dense"), "o_proj"),
    "crossattention.q_attn": "cross_q_proj",
    "crossattention.k_proj": "cross_k_proj",
    "crossattention.v_proj": "cross_v_proj",
    "crossattention.c_proj": "cross_o_proj",
}
"""Role of a module by the last segments of its name."""


def role_of(name: str) -> str:
    """Role of a module of the models below; the longest ending that `ROLES` has."""
    segments = name.split(".")
    for start in range(len(segments)):
        role = ROLES.get(".".join(segments[start:]))
        if role is not None:
            return role
    if ".".join(segments[-2:]) == "output.dense":  # BERT's kin: attention.output.dense is above
        return "down_proj"
    raise KeyError(name)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and where its fused projections are."""

    model: Any
    config: Any
    attention: str
    """Path of the first block's attention; the others' differ in the number 0."""
    fused: tuple[str, ...]
    """Projections beneath it that the hidden states enter."""
    parts: Mapping[str, int]
    """Number of rows of each part, as the sizes of the configuration tell."""
    mlp: tuple[str, str, str, str] | None = None
    """Path of the gated MLP, and its fused projection, activation, and the one behind."""


def _case(model: str, config: Any, attention: str, *fused: str, rows: tuple[int, ...], **more: Any) -> Case:
    parts = dict(zip(("q_proj", "k_proj", "v_proj"), rows, strict=True))
    return Case(model=getattr(hf, model), config=config, attention=attention, fused=fused, parts=parts, **more)


def _gated(path: str, fused: str = "gate_up_proj", activation: str = "activation_fn", down: str = "down_proj") -> Any:
    return path, fused, activation, down


CASES: dict[str, Callable[[], Case]] = {
    "gpt2": lambda: _case("GPT2LMHeadModel", hf.GPT2Config(**GPT), "transformer.h.0.attn", "c_attn", rows=(24, 24, 24)),
    "gpt_neox": lambda: _case(
        "GPTNeoXForCausalLM", hf.GPTNeoXConfig(**MHA), "gpt_neox.layers.0.attention", "query_key_value", rows=(24,) * 3
    ),
    "bloom": lambda: _case(
        "BloomForCausalLM",
        hf.BloomConfig(**TOKENS, hidden_size=24, n_head=4, n_layer=2),
        "transformer.h.0.self_attention",
        "query_key_value",
        rows=(24, 24, 24),
    ),
    "falcon-7b": lambda: _case(
        "FalconForCausalLM",
        hf.FalconConfig(**FALCON, multi_query=True),
        "transformer.h.0.self_attention",
        "query_key_value",
        rows=(24, 6, 6),
    ),
    "falcon-40b": lambda: _case(
        "FalconForCausalLM",
        hf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
        "transformer.h.0.self_attention",
        "query_key_value",
        rows=(24, 12, 12),
    ),
    "falcon-rw": lambda: _case(
        "FalconForCausalLM",
        hf.FalconConfig(**FALCON, multi_query=False, alibi=True),
        "transformer.h.0.self_attention",
        "query_key_value",
        rows=(24, 24, 24),
    ),
    "phi3": lambda: _case(
        "Phi3ForCausalLM",
        hf.Phi3Config(**GQA),
        "model.layers.0.self_attn",
        "qkv_proj",
        rows=(24, 12, 12),
        mlp=_gated("model.layers.0.mlp"),
    ),
    "phi": lambda: _case(
        "PhiForCausalLM",
        hf.PhiConfig(**MHA | {"hidden_size": 32}),  # rotates half of a head, by pairs
        "model.layers.0.self_attn",
        "q_proj",
        "k_proj",
        "v_proj",
        rows=(32, 32, 32),
    ),
    "mpt": lambda: _case(
        "MptForCausalLM",
        hf.MptConfig(**TOKENS, d_model=24, n_heads=4, n_layers=2, max_seq_len=16),
        "transformer.blocks.0.attn",
        "Wqkv",
        rows=(24, 24, 24),
    ),
    "gpt_bigcode-multi-query": lambda: _case(
        "GPTBigCodeForCausalLM",
        hf.GPTBigCodeConfig(**GPT, multi_query=True),
        "transformer.h.0.attn",
        "c_attn",
        rows=(24, 6, 6),
    ),
    "gpt_bigcode-multi-head": lambda: _case(
        "GPTBigCodeForCausalLM",
        hf.GPTBigCodeConfig(**GPT, multi_query=False),
        "transformer.h.0.attn",
        "c_attn",
        rows=(24, 24, 24),
    ),
    "codegen": lambda: _case(
        "CodeGenForCausalLM",
        hf.CodeGenConfig(**GPT | {"n_embd": 48, "n_head": 8}, rotary_dim=4),
        "transformer.h.0.attn",
        "qkv_proj",
        rows=(48, 48, 48),
    ),
    "persimmon": lambda: _case(
        "PersimmonForCausalLM",
        hf.PersimmonConfig(**MHA | {"hidden_size": 32}, qk_layernorm=False),
        "model.layers.0.self_attn",
        "query_key_value",
        rows=(32, 32, 32),
    ),
    "glm": lambda: _case(
        "GlmForCausalLM",
        hf.GlmConfig(**GQA, head_dim=8),
        "model.layers.0.self_attn",
        *("q_proj", "k_proj", "v_proj"),
        rows=(32, 16, 16),
        mlp=_gated("model.layers.0.mlp"),
    ),
    "glm4": lambda: _case(
        "Glm4ForCausalLM",
        hf.Glm4Config(**GQA, head_dim=8),
        "model.layers.0.self_attn",
        *("q_proj", "k_proj", "v_proj"),
        rows=(32, 16, 16),
        mlp=_gated("model.layers.0.mlp"),
    ),
    "modernbert": lambda: _case(
        "ModernBertModel",
        hf.ModernBertConfig(
            **MHA | {"intermediate_size": 20}, cls_token_id=1, sep_token_id=2, max_position_embeddings=16
        ),
        "layers.0.attn",
        "Wqkv",
        rows=(24, 24, 24),
        mlp=_gated("layers.0.mlp", "Wi", "act", "Wo"),
    ),
    "deberta": lambda: _case(
        "DebertaModel",
        hf.DebertaConfig(**MHA, max_position_embeddings=16, type_vocab_size=2),
        "encoder.layer.0.attention.self",
        "in_proj",
        rows=(24, 24, 24),
    ),
    "bark": lambda: _case(
        "BarkSemanticModel",
        hf.BarkSemanticConfig(
            input_vocab_size=VOCABULARY,
            output_vocab_size=VOCABULARY,
            hidden_size=24,
            num_heads=4,
            num_layers=2,
            block_size=16,
            bias=False,
        ),
        "layers.0.attn",
        "att_proj",
        rows=(24, 24, 24),
    ),
}


def run_text(model: nn.Module) -> Callable[[int], object]:
    """Runs a model on that many sequences of one token."""
    return lambda count: model(input_ids=torch.zeros(count, 1, dtype=torch.long) + 3)


@pytest.fixture
def expected_of(build: Any, attention_parts: Any, gate_up_parts: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model of a case, and name and matrix of each of its modules."""
    # DeBERTa divides the query by the root of its width before the product.
    monkeypatch.setattr(
        "transformers.models.deberta.modeling_deberta.scaled_size_sqrt", lambda *_: torch.ones(()), raising=True
    )

    def expect(case: Case) -> tuple[Any, Matrices]:
        model = build(case.model, case.config)
        fused: list[str] = []
        parts: Matrices = {}
        for layer in range(2):
            path = case.attention.replace(".0.", f".{layer}.")
            attention = model.get_submodule(path)
            projections = [attention.get_submodule(name) for name in case.fused]
            found = attention_parts(attention, run_text(model), *projections)
            assert {role: len(matrix) for role, matrix in found.items()} == case.parts
            parts |= {f"{path}.{role}": matrix for role, matrix in found.items()}
            fused += [f"{path}.{name}" for name in case.fused]
            if case.mlp is not None:
                path, *names = (name.replace(".0.", f".{layer}.") for name in case.mlp)
                mlp = model.get_submodule(path)
                found = gate_up_parts(mlp, *(mlp.get_submodule(name) for name in names))
                parts |= {f"{path}.{role}": matrix for role, matrix in found.items()}
                fused.append(f"{path}.{names[0]}")
        others = linears(model, *HEADS, *fused)
        assert not set(others) & set(parts)
        return model, others | parts

    return expect


@pytest.mark.parametrize("family", CASES)
def test_parts_as_the_model_uses_them(family: str, expected_of: Any, tmp_path: Path) -> None:
    case = CASES[family]()
    model, expected = expected_of(case)
    model.save_pretrained(tmp_path)
    analysis = check(tmp_path, expected)
    assert roles(analysis) == {name: role_of(name) for name in expected}
    by_name = {module.name: module for module in analysis.modules}
    for layer in range(2):
        for role, rows in case.parts.items():
            module = by_name[f"{case.attention.replace('.0.', f'.{layer}.')}.{role}"]
            assert (module.layer, sorted(module.shape)) == (layer, sorted((rows, len(expected[module.name].T))))
    live = esdtool.analyze(model, min_eigs=2, jobs=1)
    assert {module.name: module.role for module in live.modules} == roles(analysis)


def test_gpt2_with_cross_attention(build: Any, attention_parts: Any, tmp_path: Path) -> None:
    """Cross-attention has its keys and values in `c_attn`, its queries in `q_attn` (GPT2Attention.forward)."""
    config = hf.GPT2Config(**GPT | {"n_layer": 1}, add_cross_attention=True)
    model = build(hf.GPT2LMHeadModel, config)
    block = model.transformer.h[0]

    def run(count: int) -> object:
        tokens = torch.full((count, 1), 3)
        return model(input_ids=tokens, encoder_hidden_states=torch.zeros(count, 1, config.n_embd))

    own = attention_parts(block.attn, run, block.attn.c_attn)
    cross = attention_parts(block.crossattention, run, block.crossattention.q_attn, block.crossattention.c_attn)
    torch.testing.assert_close(cross["q_proj"], block.crossattention.q_attn.weight.T)
    expected = linears(model, *HEADS, "attn.c_attn", "crossattention.c_attn")
    expected |= {f"transformer.h.0.attn.{role}": matrix for role, matrix in own.items()}
    expected |= {f"transformer.h.0.crossattention.{role}": cross[role] for role in ("k_proj", "v_proj")}
    model.save_pretrained(tmp_path)
    analysis = check(tmp_path, expected)
    assert roles(analysis) == {name: role_of(name) for name in expected}


def test_gpt_bigcode_with_cross_attention(build: Any) -> None:
    """Beside `q_attn`, `c_attn` has keys and values only: two parts (GPTBigCodeAttention.__init__), never three.

    transformers cannot run this attention with more than one head, so only the sizes are known.
    """
    config = hf.GPTBigCodeConfig(**GPT | {"n_layer": 1}, multi_query=False, add_cross_attention=True)
    model = build(hf.GPTBigCodeForCausalLM, config)
    assert model.transformer.h[0].crossattention.c_attn.weight.shape == (48, 24)
    analysis = esdtool.analyze(model, min_eigs=2, jobs=1)
    path = "transformer.h.0.crossattention"
    assert {module.name: module.shape for module in analysis.modules if module.name.startswith(path)} == {
        f"{path}.{name}": (24, 24) for name in ("q_attn", "k_proj", "v_proj", "c_proj")
    }


def test_qwen3_next(build: Any, attention_parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear attention by key head, and queries with an output gate.

    The gated projection is called `q_proj` itself, so its parts are named below it.
    """
    from transformers.models.qwen3_next import modeling_qwen3_next

    config = hf.Qwen3NextConfig(
        **GQA,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        mlp_only_layers=[0, 1],
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=5,
        linear_value_head_dim=7,
    )
    model = build(hf.Qwen3NextForCausalLM, config)
    with torch.no_grad():
        linear = model.model.layers[0].linear_attn
        basis = torch.eye(24)[:, None]
        parts = linear.fix_query_key_value_ordering(linear.in_proj_qkvz(basis), linear.in_proj_ba(basis))
    names = ("q_proj", "k_proj", "v_proj", "z_proj", "b_proj", "a_proj")
    own = {name: states.reshape(24, -1).T for name, states in zip(names, parts, strict=True)}
    assert [len(matrix) for matrix in own.values()] == [10, 10, 42, 42, 6, 6]
    for fused, roles_of_it in ((linear.in_proj_qkvz, names[:4]), (linear.in_proj_ba, names[4:])):
        rows = torch.cat([own[name] for name in roles_of_it])
        torch.testing.assert_close(rows.unique(dim=0), fused.weight.detach().unique(dim=0))

    attention = model.model.layers[1].self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    with monkeypatch.context() as patch:  # the norm of each head is no linear map
        patch.setattr(modeling_qwen3_next.Qwen3NextRMSNorm, "forward", lambda _, states: states)
        full = attention_parts(attention, run_text(model), *projections, gate=True)
    assert [len(matrix) for matrix in full.values()] == [32, 16, 16, 32]

    expected = linears(model, *HEADS, "in_proj_qkvz", "in_proj_ba", "q_proj", "k_proj", "v_proj")
    expected |= {f"model.layers.0.linear_attn.{name}": matrix for name, matrix in own.items()}
    expected |= {f"model.layers.1.self_attn.{name}": full[name] for name in ("k_proj", "v_proj")}
    expected |= {f"model.layers.1.self_attn.q_proj.{name}": full[name] for name in ("q_proj", "q_gate")}
    model.save_pretrained(tmp_path)
    found = roles(check(tmp_path, expected))
    for name, role in found.items():
        assert role == ("o_proj" if name.endswith("out_proj") else name.rpartition(".")[2]), name


def test_moonshine(build: Any, gate_up_parts: Any, tmp_path: Path) -> None:
    """The decoder's `fc1` holds up first and gate second (MoonshineDecoderMLP.forward); the encoder's is plain."""
    config = hf.MoonshineConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=20,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        decoder_num_key_value_heads=2,
    )
    model = build(hf.MoonshineForConditionalGeneration, config)
    decoder = "model.decoder.layers"
    expected = linears(model, *HEADS, *(f"{decoder}.{layer}.mlp.fc1" for layer in range(2)))
    for layer in range(2):
        mlp = model.get_submodule(f"{decoder}.{layer}.mlp")
        parts = gate_up_parts(mlp, mlp.fc1, mlp.activation_fn, mlp.fc2)
        torch.testing.assert_close(parts["up_proj"], mlp.fc1.weight[:20])
        expected |= {f"{decoder}.{layer}.mlp.{role}": matrix for role, matrix in parts.items()}
    model.save_pretrained(tmp_path)
    found = roles(check(tmp_path, expected, exclude=[r"encoder\.conv\d"]))
    for name, role in found.items():
        cross = "cross_" if "encoder_attn" in name else ""
        assert role == cross + role_of(name), name


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon-40b", "phi3", "modernbert", "mpt"])
def test_kept_whole(family: str, build: Any, tmp_path: Path) -> None:
    """`split_fused=False`: the file's matrices as they are, each under its own last name."""
    case = CASES[family]()
    model = build(case.model, case.config)
    model.save_pretrained(tmp_path)
    expected = linears(model, *HEADS)
    analysis = check(tmp_path, expected, split_fused=False)
    fused = {*case.fused, *((case.mlp[1],) if case.mlp else ())}
    whole = {name: role for name, role in roles(analysis).items() if name.rpartition(".")[2] in fused}
    assert len(whole) == 2 * len(fused)
    assert all(role == name.rpartition(".")[2] for name, role in whole.items())


@pytest.mark.parametrize("family", ["gpt2", "mpt", "modernbert"])
def test_without_config_json_where_names_and_shapes_tell(family: str, expected_of: Any, tmp_path: Path) -> None:
    """GPT-2, and plain thirds; gate and up of ModernBERT are told by the width of `Wo`."""
    model, expected = expected_of(CASES[family]())
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, file)
    check(file, expected)


def test_codegen_without_config_json_is_never_cut_wrong(expected_of: Any) -> None:
    """Its `qkv_proj` [3H, H] looks like three plain thirds, but goes in four groups, values before keys."""
    model, expected = expected_of(CASES["codegen"]())
    analysis = esdtool.analyze(from_state_dict(model.state_dict()), min_eigs=2, jobs=1)
    for module in analysis.modules:
        singular = np.linalg.svd(expected[module.name].numpy().astype(np.float64), compute_uv=False)
        np.testing.assert_allclose(
            np.sqrt(analysis.esds[module.name]), singular[::-1], atol=1e-6 * singular[0], err_msg=module.name
        )


WIDTH = 24
LINEAR = ("model.layers.0.mlp.down_proj.weight", torch.eye(8))
"""Something to analyse beside the tensor in question."""


def reason_not_to_split(name: str, shape: tuple[int, int], config: Mapping[str, Any] | None) -> str:
    """Why a tensor is left out; that it is."""
    mapping = dict([LINEAR, (name, torch.randn(shape, generator=torch.Generator().manual_seed(0)))])
    analysis = esdtool.analyze(from_state_dict(mapping, config=config), min_eigs=2, jobs=1)
    assert [module.parameter for module in analysis.modules] == [LINEAR[0]]
    (skipped,) = analysis.skipped
    assert skipped.name == name
    return skipped.reason


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("gpt_neox.layers.0.attention.query_key_value.weight", 72),
        ("transformer.h.0.self_attention.query_key_value.weight", 72),  # BLOOM, Falcon
        ("transformer.h.0.self_attention.query_key_value.weight", 36),
        ("model.layers.0.self_attn.qkv_proj.weight", 48),  # grouped queries: not three equal parts
        ("transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight", 48),
        ("transformer.h.0.attn.c_attn.weight", 36),  # StarCoder
        ("model.layers.0.attention.wqkv.weight", 48),
        ("model.layers.0.attention.wqkv.weight", 72),  # InternLM2 without grouped queries: still head by head
        ("deberta.encoder.layer.0.attention.self.in_proj.weight", 72),
    ],
)
def test_what_only_config_json_tells_is_not_split_without_it(name: str, rows: int) -> None:
    reason = reason_not_to_split(name, (rows, WIDTH), None)
    assert reason.startswith("fused")
    assert "config.json" in reason


@pytest.mark.parametrize(
    ("name", "rows", "config"),
    [
        (
            "gpt_neox.layers.0.attention.query_key_value.weight",
            72,
            {"model_type": "gpt_neox", "hidden_size": WIDTH, "num_attention_heads": 5},
        ),
        (
            "transformer.h.0.self_attention.query_key_value.weight",
            72,
            {"model_type": "bloom", "hidden_size": WIDTH, "n_head": 7},
        ),
        (
            "transformer.h.0.self_attention.query_key_value.weight",
            48,
            {
                "model_type": "falcon",
                "hidden_size": WIDTH,
                "num_attention_heads": 4,
                "num_kv_heads": 3,
                "new_decoder_architecture": True,
            },
        ),
        (
            "transformer.h.0.self_attention.query_key_value.weight",
            37,
            {"model_type": "falcon", "hidden_size": WIDTH, "num_attention_heads": 4, "multi_query": True},
        ),
        (
            "model.layers.0.self_attn.qkv_proj.weight",
            50,
            {"model_type": "phi3", "hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2},
        ),
        (
            "transformer.h.0.attn.c_attn.weight",
            37,
            {"model_type": "gpt_bigcode", "n_embd": WIDTH, "n_head": 4, "multi_query": True},
        ),
        (
            "model.layers.0.attention.wqkv.weight",
            50,
            {"model_type": "internlm2", "hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2},
        ),
        (
            "transformer.encoder.layers.0.self_attention.query_key_value.weight",
            50,
            {
                "model_type": "chatglm",
                "hidden_size": WIDTH,
                "num_attention_heads": 4,
                "kv_channels": 6,
                "multi_query_attention": True,
                "multi_query_group_num": 2,
            },
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(name: str, rows: int, config: dict[str, Any]) -> None:
    reason = reason_not_to_split(name, (rows, WIDTH), config)
    assert reason.startswith("fused")
    assert f"{rows}x{WIDTH}" in reason
    assert "fit" in reason
    assert "missing" not in reason


# Ways to write q, k and v in one tensor, each with the configuration that tells how it is done.


def one_after_the_other(parts: Matrices, **sizes: int) -> tuple[str, torch.Tensor, dict[str, Any]]:
    return "qkv_proj.weight", torch.cat(list(parts.values())), {"model_type": "phi3", **sizes}


def transposed(parts: Matrices, **sizes: int) -> tuple[str, torch.Tensor, dict[str, Any]]:
    return "c_attn.weight", torch.cat(list(parts.values())).T.contiguous(), {"model_type": "gpt2", **sizes}


def by_group(parts: Matrices, **sizes: int) -> tuple[str, torch.Tensor, dict[str, Any]]:
    groups = [matrix.chunk(sizes["num_key_value_heads"]) for matrix in parts.values()]
    rows = [rows for group in zip(*groups, strict=True) for rows in group]
    sizes["num_kv_heads"] = sizes.pop("num_key_value_heads")
    config = {"model_type": "falcon", "new_decoder_architecture": True, **sizes}
    return "query_key_value.weight", torch.cat(rows), config


def by_head(parts: Matrices, **sizes: int) -> tuple[str, torch.Tensor, dict[str, Any]]:
    heads = [matrix.chunk(sizes["num_attention_heads"]) for matrix in parts.values()]
    rows = [rows for head in zip(*heads, strict=True) for rows in head]
    return "query_key_value.weight", torch.cat(rows), {"model_type": "gpt_neox", **sizes}


def multi_query(parts: Matrices, **sizes: int) -> tuple[str, torch.Tensor, dict[str, Any]]:
    return "c_attn.weight", torch.cat(list(parts.values())), {"model_type": "gpt_bigcode", "multi_query": True, **sizes}


@pytest.mark.parametrize("write", [one_after_the_other, transposed, by_group, by_head, multi_query])
@settings(max_examples=10, deadline=None)
@given(
    groups=st.integers(1, 4),
    per_group=st.integers(1, 3),
    width=st.integers(1, 4).map(lambda half: 2 * half),
    seed=st.integers(0, 2**16),
)
def test_fused_or_apart_it_is_the_same(write: Any, groups: int, per_group: int, width: int, seed: int) -> None:
    if write is by_head or write is transposed:
        per_group = 1
    if write is multi_query:
        groups = 1
    heads = groups * per_group
    hidden = heads * width
    generator = torch.Generator().manual_seed(seed)
    parts = {
        role: torch.randn(count * width, hidden, generator=generator)
        for role, count in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups))
    }
    name, fused, config = write(parts, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=groups)
    block = "transformer.h.0.attn"
    one = check({f"{block}.{name}": fused}, {f"{block}.{role}": part for role, part in parts.items()}, config=config)
    apart = {f"{block}.{role}.weight": part for role, part in parts.items()}
    three = esdtool.analyze(from_state_dict(apart, config=config), min_eigs=2, jobs=1)
    assert roles(one) == roles(three)
    for module in three.modules:
        np.testing.assert_allclose(one.esds[module.name], three.esds[module.name], rtol=1e-9, atol=1e-9)


@settings(max_examples=10, deadline=None)
@given(width=st.integers(2, 9), hidden=st.integers(2, 9), seed=st.integers(0, 2**16))
def test_gate_and_up_fused_or_apart(width: int, hidden: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(width, hidden, generator=generator) for _ in range(2))
    down = torch.randn(hidden, width, generator=generator)
    mlp = "model.layers.0.mlp"
    expected = {f"{mlp}.gate_proj": gate, f"{mlp}.up_proj": up, f"{mlp}.down_proj": down}
    one = check({f"{mlp}.gate_up_proj.weight": torch.cat([gate, up]), f"{mlp}.down_proj.weight": down}, expected)
    three = check({f"{name}.weight": matrix for name, matrix in expected.items()}, expected)
    assert roles(one) == roles(three)


def test_a_name_that_is_taken_gives_way() -> None:
    """A part is not given the name of another module: then all parts are named below the fused one."""
    generator = torch.Generator().manual_seed(0)
    fused, other = torch.randn(72, 24, generator=generator), torch.randn(24, 24, generator=generator)
    attention = "blocks.0.attn"
    query, key, value = fused.chunk(3)
    check(
        {f"{attention}.qkv.weight": fused, f"{attention}.q_proj.weight": other},
        {
            f"{attention}.q_proj": other,
            f"{attention}.qkv.q_proj": query,
            f"{attention}.qkv.k_proj": key,
            f"{attention}.qkv.v_proj": value,
        },
    )
