"""Recurrent layers, torch's own attention, and vision towers with fused projections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from tests.modules.families.oracle import check, linears, roles

Matrices = dict[str, torch.Tensor]
ATTENTION = ("q_proj", "k_proj", "v_proj")


# Recurrent layers. Which rows belong to which gate is found by what they do: in each step below all biases are equal,
# so nothing is assumed of their order, and the derivatives of torch's own layer at zero input tell the matrices.
# With s = sigmoid(b), ds its derivative, t = tanh(b):
#   LSTM: c' = f c + i g, h' = o tanh(c'), with i, f, o sigmoids and g a tanh.
#   GRU: h' = (1 - z) n + z h, n = tanh(W x + b_ih + r (V h + b_hh)), with r, z sigmoids.

BIAS = 0.7


def derivative(function: Callable[[torch.Tensor], torch.Tensor], size: int) -> torch.Tensor:
    """Jacobian [out, size] at zero."""
    return torch.autograd.functional.jacobian(function, torch.zeros(size, dtype=torch.float64))


def sigmoid_and_slope(value: float) -> tuple[float, float]:
    s = torch.sigmoid(torch.tensor(value, dtype=torch.float64)).item()
    return s, s * (1 - s)


def tanh_and_slope(value: float) -> tuple[float, float]:
    t = torch.tanh(torch.tensor(value, dtype=torch.float64)).item()
    return t, 1 - t * t


def one_layer(kind: type[nn.RNNBase], ih: torch.Tensor, hh: torch.Tensor, *, b_ih: float, b_hh: float) -> Any:
    """A layer in float64 with these weights, and two biases, the same for all of its rows."""
    layer = kind(ih.shape[1], hh.shape[1]).double()
    with torch.no_grad():
        layer.weight_ih_l0.copy_(ih)
        layer.weight_hh_l0.copy_(hh)
        layer.bias_ih_l0.fill_(b_ih)
        layer.bias_hh_l0.fill_(b_hh)
    return layer


def lstm_gates(ih: torch.Tensor, hh: torch.Tensor) -> tuple[Matrices, Matrices]:
    """The matrices of each gate on the input, and on the hidden state."""
    hidden = hh.shape[1]

    def derivatives(*, bias: float, cell: float, output: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the hidden state (output 0) or the cell (1), for the input and for the hidden state before."""
        layer = one_layer(nn.LSTM, ih, hh, b_ih=bias, b_hh=0)
        c = torch.full((1, hidden), cell, dtype=torch.float64)
        zero_x, zero_h = torch.zeros(1, ih.shape[1]).double(), torch.zeros(1, hidden).double()
        return (
            derivative(lambda x: layer(x[None], (zero_h, c))[1][output][0], ih.shape[1]),
            derivative(lambda h: layer(zero_x, (h[None], c))[1][output][0], hidden),
        )

    s, ds = sigmoid_and_slope(BIAS)
    t, dt = tanh_and_slope(BIAS)
    t_half, dt_half = tanh_and_slope(0.5)
    both = []
    at_zero = derivatives(bias=0, cell=0, output=1)
    with_cell = derivatives(bias=0, cell=1, output=1)
    with_bias = derivatives(bias=BIAS, cell=0, output=1)
    hidden_out = derivatives(bias=0, cell=1, output=0)
    for side in range(2):
        cell_gate = 2 * at_zero[side]  # dc' = i dg = dg / 2
        forget = 4 * (with_cell[side] - at_zero[side])  # and c df = df / 4 more
        into = (with_bias[side] - s * dt * cell_gate) / (ds * t)  # dc' = s dg + t di
        # dh' = tanh(c') do + o tanh'(c') dc', with c' = f c = 1/2
        out = (hidden_out[side] - 0.5 * dt_half * with_cell[side]) / (0.25 * t_half)
        both.append({"input_gate": into, "forget_gate": forget, "cell_gate": cell_gate, "output_gate": out})
    return both[0], both[1]


def gru_gates(ih: torch.Tensor, hh: torch.Tensor) -> tuple[Matrices, Matrices]:
    """The matrices of each gate on the input, and on the hidden state."""
    hidden = hh.shape[1]

    def derivatives(b_ih: float, b_hh: float) -> tuple[torch.Tensor, torch.Tensor]:
        layer = one_layer(nn.GRU, ih, hh, b_ih=b_ih, b_hh=b_hh)
        zero_x, zero_h = torch.zeros(1, ih.shape[1]).double(), torch.zeros(1, hidden).double()
        return (
            derivative(lambda x: layer(x[None], zero_h)[0][0], ih.shape[1]),
            derivative(lambda h: layer(zero_x, h[None])[0][0], hidden),
        )

    s, ds = sigmoid_and_slope(BIAS)
    eye = torch.eye(hidden, dtype=torch.float64)
    at_zero, on_input, on_hidden = derivatives(0, 0), derivatives(BIAS, 0), derivatives(0, BIAS)

    x_new = 2 * at_zero[0]  # dh' = (1 - z) dn = dn / 2
    t, dt = tanh_and_slope(BIAS)
    x_update = ((1 - s) * dt * x_new - on_input[0]) / (ds * t)  # dh' = (1 - z) dn - n dz
    t, dt = tanh_and_slope(s * BIAS)  # n = tanh(r b), so that dn has the reset gate
    x_reset = ((on_hidden[0] + ds * t * x_update) / ((1 - s) * dt) - x_new) / (ds * BIAS)

    h_new = 4 * (at_zero[1] - eye / 2)  # dh' = (1 - z) r V dh + z dh
    t, dt = tanh_and_slope(BIAS)
    h_update = ((1 - s) * dt * s * h_new + s * eye - on_input[1]) / (ds * t)
    t, dt = tanh_and_slope(s * BIAS)
    h_reset = ((on_hidden[1] - s * eye + ds * t * h_update) / ((1 - s) * dt) - s * h_new) / (ds * BIAS)
    return (
        {"reset_gate": x_reset, "update_gate": x_update, "new_gate": x_new},
        {"reset_gate": h_reset, "update_gate": h_update, "new_gate": h_new},
    )


def assert_whole(fused: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """The parts have the rows of the fused matrix, each exactly once."""
    rows = torch.cat(parts)
    assert rows.shape == fused.shape
    distances = torch.cdist(rows.double(), fused.detach().double())
    nearest = distances.argmin(dim=1)
    assert sorted(nearest.tolist()) == list(range(len(fused)))
    assert distances.min(dim=1).values.max() < 1e-7


@pytest.mark.parametrize(("kind", "gates_of"), [(nn.LSTM, lstm_gates), (nn.GRU, gru_gates)])
def test_gates_of_a_recurrent_layer(kind: type[nn.RNNBase], gates_of: Any) -> None:
    """Two layers, both directions."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": kind(6, 5, num_layers=2, bidirectional=True), "proj": nn.Linear(10, 3)})
    tensors = model.state_dict()
    expected: Matrices = {"proj": tensors["proj.weight"]}
    for layer in ("l0", "l0_reverse", "l1", "l1_reverse"):
        weights = [tensors[f"lstm.weight_{side}_{layer}"] for side in ("ih", "hh")]
        for side, weight, gates in zip(("ih", "hh"), weights, gates_of(*weights), strict=True):
            assert_whole(weight, list(gates.values()))
            expected |= {f"lstm.weight_{side}_{layer}.{gate}": matrix for gate, matrix in gates.items()}
    found = roles(check(tensors, expected))
    assert found == {name: name.rpartition(".")[2] for name in expected}


@pytest.mark.parametrize(("kind", "gates_of"), [(nn.LSTMCell, lstm_gates), (nn.GRUCell, gru_gates)])
def test_gates_of_a_cell(kind: type[nn.RNNCellBase], gates_of: Any) -> None:
    torch.manual_seed(0)
    tensors = nn.ModuleDict({"cell": kind(6, 5)}).state_dict()
    sides = zip(("ih", "hh"), gates_of(tensors["cell.weight_ih"], tensors["cell.weight_hh"]), strict=True)
    expected = {f"cell.weight_{side}.{gate}": matrix for side, gates in sides for gate, matrix in gates.items()}
    assert roles(check(tensors, expected)) == {name: name.rpartition(".")[2] for name in expected}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_kept_whole(kind: type[nn.RNNBase]) -> None:
    tensors = nn.ModuleDict({"layer": kind(6, 5)}).state_dict()
    expected = {name: weight for name, weight in tensors.items() if weight.ndim == 2}
    found = roles(check(tensors, expected, split_fused=False))
    assert found == {name: name.rpartition(".")[2] for name in expected}


def test_a_plain_recurrent_layer_is_one_matrix() -> None:
    tensors = nn.ModuleDict({"rnn": nn.RNN(6, 5, num_layers=2)}).state_dict()
    expected = {name: weight for name, weight in tensors.items() if weight.ndim == 2}
    assert len(expected) == 4
    check(tensors, expected)


# torch.nn.MultiheadAttention


def mha_parts(attention: nn.MultiheadAttention, monkeypatch: pytest.MonkeyPatch) -> Matrices:
    """q, k and v as torch's own forward hands them to the attention operator, token by basis vector."""
    seen: list[torch.Tensor] = []
    operator = nn.functional.scaled_dot_product_attention

    def record(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        seen.extend((query, key, value))
        return operator(query, key, value, *args, **more)

    size = attention.embed_dim
    basis = torch.eye(size)[:, None] if attention.batch_first else torch.eye(size)[None]
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", record)
        attention(basis, basis, basis, need_weights=False)
    parts = {role: states.detach().reshape(size, -1).T for role, states in zip(ATTENTION, seen, strict=True)}
    assert_whole(attention.in_proj_weight, list(parts.values()))
    return parts


def test_torch_multihead_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"pool": nn.MultiheadAttention(24, 4, batch_first=True)})
    expected = {f"pool.{role}": matrix for role, matrix in mha_parts(model["pool"], monkeypatch).items()}
    expected["pool.out_proj"] = model["pool"].out_proj.weight
    found = roles(check(model.state_dict(), expected))
    assert {role: found[f"pool.{role}"] for role in ATTENTION} == {role: role for role in ATTENTION}


def test_torch_multihead_attention_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a name before it, the parts have their roles as names."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(24, 4)
    check(attention.state_dict(), mha_parts(attention, monkeypatch) | {"out_proj": attention.out_proj.weight})


def test_torch_multihead_attention_with_other_widths() -> None:
    """Keys and values of another width than the queries: three parameters, each with its own name."""
    tensors = nn.ModuleDict({"attn": nn.MultiheadAttention(24, 4, kdim=10, vdim=14)}).state_dict()
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    expected = {f"attn.{name}": tensors[f"attn.{name}"] for name in names}
    found = roles(check(tensors, expected | {"attn.out_proj": tensors["attn.out_proj.weight"]}))
    assert [found[f"attn.{name}"] for name in names] == list(ATTENTION)


def test_torch_transformer_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """`multihead_attn` is the attention on the encoder's output."""
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 4, 40, dropout=0), 2)
    expected = linears(model)
    for layer, block in enumerate(model.layers):
        for name in ("self_attn", "multihead_attn"):
            parts = mha_parts(block.get_submodule(name), monkeypatch)
            expected |= {f"layers.{layer}.{name}.{role}": matrix for role, matrix in parts.items()}
    found = roles(check(model.state_dict(), expected))
    for layer in range(2):
        for role in ATTENTION:
            assert found[f"layers.{layer}.self_attn.{role}"] == role
            assert found[f"layers.{layer}.multihead_attn.{role}"] == f"cross_{role}"
        assert found[f"layers.{layer}.self_attn.out_proj"] == "o_proj"
        assert found[f"layers.{layer}.multihead_attn.out_proj"] == "cross_o_proj"
        assert found[f"layers.{layer}.linear1"] == "up_proj"
        assert found[f"layers.{layer}.linear2"] == "down_proj"


# Vision


def convolution(weight: torch.Tensor) -> torch.Tensor:
    """A matrix with the spectrum that esdtool defines for a convolution: all kernel positions, eigenvalues halved."""
    return torch.block_diag(*weight.detach().flatten(2).unbind(-1)) * 0.5**0.5


VISION_ROLES = {
    **{role: role for role in ATTENTION},
    **dict.fromkeys(("proj", "projection", "o_proj"), "o_proj"),
    **dict.fromkeys(("fc1", "lin1"), "up_proj"),
    **dict.fromkeys(("fc2", "lin2"), "down_proj"),
}
"""Role by the last segment of a name."""


def in_blocks(found: dict[str, str], path: str) -> dict[str, str]:
    """Roles of the modules beneath a path, by the last segments of their names."""
    return {name.rpartition(".")[2]: role for name, role in found.items() if name.startswith(path)}


def test_blip(build: Any, attention_parts: Any, tmp_path: Path) -> None:
    """The vision tower has `qkv`, reshaped to (3, heads, width); the text decoder has separate projections."""
    config = hf.BlipConfig(
        text_config={
            "vocab_size": 50,
            "hidden_size": 24,
            "encoder_hidden_size": 16,
            "intermediate_size": 40,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "max_position_embeddings": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "sep_token_id": 2,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 8,
            "patch_size": 4,
        },
        projection_dim=8,
    )
    model = build(hf.BlipForConditionalGeneration, config)
    expected = linears(model, "self_attn.qkv", "predictions.decoder", "predictions.transform.dense")
    for layer in range(2):
        path = f"vision_model.encoder.layers.{layer}.self_attn"
        attention = model.get_submodule(path)
        parts = attention_parts(attention, lambda count, run=attention: run(torch.zeros(count, 1, 16)), attention.qkv)
        expected |= {f"{path}.{role}": matrix for role, matrix in parts.items()}
    model.save_pretrained(tmp_path)
    found = roles(check(tmp_path, expected))
    for name, role in in_blocks(found, "vision_model").items():
        assert role == VISION_ROLES[name], name
    block = "text_decoder.bert.encoder.layer.0"
    for name, role in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        assert found[f"{block}.attention.self.{name}"] == role
        assert found[f"{block}.crossattention.self.{name}"] == f"cross_{role}"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_sam(implementation: str, build: Any, attention_parts: Any, tmp_path: Path) -> None:
    """`qkv` of windowed and of global attention, with relative positions beside it."""
    config = hf.SamVisionConfig(
        hidden_size=24,
        output_channels=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        window_size=2,
        global_attn_indexes=[1],
        mlp_dim=40,
        num_pos_feats=4,
        attn_implementation=implementation,
    )
    model = build(hf.SamVisionModel, config)
    expected = linears(model, "attn.qkv")
    for layer in range(2):
        path = f"vision_encoder.layers.{layer}.attn"
        attention = model.get_submodule(path)
        attention.scale = 1.0  # without the fused operator, it multiplies the query

        def run(count: int, attention: nn.Module = attention) -> object:
            return attention(torch.zeros(count, 1, 1, 24))

        parts = attention_parts(attention, run, attention.qkv)
        expected |= {f"{path}.{role}": matrix for role, matrix in parts.items()}
    neck = model.vision_encoder.neck
    expected["vision_encoder.neck.conv1"] = convolution(neck.conv1.weight)
    expected["vision_encoder.neck.conv2"] = convolution(neck.conv2.weight)
    model.save_pretrained(tmp_path)
    found = roles(check(tmp_path, expected))
    for name, role in in_blocks(found, "vision_encoder.layers").items():
        assert role == VISION_ROLES[name], name


def test_qwen2_5_vl_tower(build: Any, attention_parts: Any, tmp_path: Path) -> None:
    """A vision tower by itself: its sizes are at the top of config.json; `qkv` beside a gated MLP."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = hf.Qwen2_5_VLConfig().vision_config.__class__(
        depth=2, hidden_size=16, intermediate_size=20, num_heads=2, out_hidden_size=24, patch_size=2, window_size=8
    )
    model = build(Qwen2_5_VisionTransformerPretrainedModel, config)
    expected = linears(model, "attn.qkv")
    for layer in range(2):
        path = f"blocks.{layer}.attn"
        attention = model.get_submodule(path)

        def run(count: int, attention: nn.Module = attention) -> object:
            at_origin = torch.ones(count, 8), torch.zeros(count, 8)  # cosine and sine
            return attention(torch.zeros(count, 16), cu_seqlens=torch.arange(count + 1), position_embeddings=at_origin)

        parts = attention_parts(attention, run, attention.qkv)
        expected |= {f"{path}.{role}": matrix for role, matrix in parts.items()}
    model.save_pretrained(tmp_path)
    found = roles(check(tmp_path, expected))
    for name, role in in_blocks(found, "blocks").items():
        assert role == ("o_proj" if name == "proj" else name), name


def test_swin(build: Any, tmp_path: Path) -> None:
    """Separate projections: live under their roles, in files under BERT's names."""
    config = hf.SwinConfig(image_size=16, patch_size=2, embed_dim=12, depths=[1, 1], num_heads=[2, 3], window_size=4)
    model = build(hf.SwinModel, config)
    live = linears(model)
    in_files = {
        "attention.q_proj": "attention.self.query",
        "attention.k_proj": "attention.self.key",
        "attention.v_proj": "attention.self.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    assert {ending for ending in in_files if any(name.endswith(ending) for name in live)} == set(in_files)
    saved = {}
    for name, matrix in live.items():
        for ending, replacement in in_files.items():
            name = name.replace(f".{ending}", f".{replacement}")
        saved[name] = matrix
    model.save_pretrained(tmp_path)
    found = roles(check(tmp_path, saved))
    found_live = roles(check(model.state_dict(), live, config=config.to_dict()))
    assert sorted(found.values()) == sorted(found_live.values())
    assert {name: role for name, role in found_live.items() if "reduction" not in name} == {
        name: VISION_ROLES[name.rpartition(".")[2]] for name in live if "reduction" not in name
    }


class TimmAttention(nn.Module):
    """timm's vision attention: `qkv` reshaped to (3, heads, width)."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.proj = nn.Linear(size, size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = states.shape
        parts = self.qkv(states).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*parts.unbind(0))
        return self.proj(attended.transpose(1, 2).flatten(2))


class TimmBlock(nn.Module):
    def __init__(self, size: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attn = TimmAttention(size, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(size, inner), "fc2": nn.Linear(inner, size)})


def test_timm_style(attention_parts: Any) -> None:
    """No configuration: thirds tell themselves."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "patch_embed": nn.ModuleDict({"proj": nn.Conv2d(3, 24, 4, 4)}),
            "blocks": nn.ModuleList([TimmBlock(24, 4, 40) for _ in range(2)]),
            "head": nn.Linear(24, 10),
        }
    )
    expected = linears(model, "attn.qkv", "head")
    for layer in range(2):
        attention = model["blocks"][layer].attn
        parts = attention_parts(attention, lambda count, run=attention: run(torch.zeros(count, 1, 24)), attention.qkv)
        expected |= {f"blocks.{layer}.attn.{role}": matrix for role, matrix in parts.items()}
    found = roles(check(model.state_dict(), expected))
    assert found == {name: VISION_ROLES[name.rpartition(".")[2]] for name in expected}
