"""Against transformers and torch: every Linear inside a block is scored, or left out for the right reason.

The oracle is the model's own structure (nn.Linear, nn.Embedding, nn.ModuleList), not its names.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.pytorch_utils import Conv1D

from esdtool.checkpoint.base import TensorInfo
from esdtool.modules import Selection, select_modules

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CROSS = tuple(f"cross_{role}" for role in ATTENTION)
GATED = ("gate_proj", "up_proj", "down_proj")
PLAIN = ("up_proj", "down_proj")
LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}
BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
}
MOE = LLAMA | {"moe_intermediate_size": 12, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 4}
WHISPER = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 10,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
GPT2 = {
    "vocab_size": 40,
    "n_positions": 12,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _clip() -> Any:
    text = BERT | {"projection_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    return hf.CLIPConfig(text_config=text, vision_config=VISION | {"projection_dim": 8}, projection_dim=8)


# name: (configuration, auto class, roles in every block of every stack)
FAMILIES: dict[str, tuple[Callable[[], Any], Any, tuple[str, ...]]] = {
    "llama": (lambda: hf.LlamaConfig(**LLAMA), hf.AutoModelForCausalLM, ATTENTION + GATED),
    "llama-untied-bias": (
        lambda: hf.LlamaConfig(**LLAMA, attention_bias=True, tie_word_embeddings=False),
        hf.AutoModelForCausalLM,
        ATTENTION + GATED,
    ),
    "mistral": (lambda: hf.MistralConfig(**LLAMA), hf.AutoModelForCausalLM, ATTENTION + GATED),
    "qwen2": (lambda: hf.Qwen2Config(**LLAMA), hf.AutoModelForCausalLM, ATTENTION + GATED),
    "qwen3": (lambda: hf.Qwen3Config(**LLAMA), hf.AutoModelForCausalLM, ATTENTION + GATED),
    "gemma": (lambda: hf.GemmaConfig(**LLAMA), hf.AutoModelForCausalLM, ATTENTION + GATED),
    "gemma2": (lambda: hf.Gemma2Config(**LLAMA), hf.AutoModelForCausalLM, ATTENTION + GATED),
    "gemma3": (lambda: hf.Gemma3TextConfig(**LLAMA), hf.AutoModelForCausalLM, ATTENTION + GATED),
    "olmo": (lambda: hf.OlmoConfig(**LLAMA), hf.AutoModelForCausalLM, ATTENTION + GATED),
    "olmo2": (lambda: hf.Olmo2Config(**LLAMA), hf.AutoModelForCausalLM, ATTENTION + GATED),
    "phi3": (
        lambda: hf.Phi3Config(**LLAMA),
        hf.AutoModelForCausalLM,
        ATTENTION + GATED,
    ),
    "bert": (lambda: hf.BertConfig(**BERT), hf.AutoModelForMaskedLM, ATTENTION + PLAIN),
    "bert-pooler": (lambda: hf.BertConfig(**BERT), hf.AutoModel, ATTENTION + PLAIN),
    "bert-classifier": (
        lambda: hf.BertConfig(**BERT),
        hf.AutoModelForSequenceClassification,
        ATTENTION + PLAIN,
    ),
    "bert-decoder": (
        lambda: hf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True),
        hf.AutoModelForCausalLM,
        ATTENTION + CROSS + PLAIN,
    ),
    "roberta": (lambda: hf.RobertaConfig(**BERT), hf.AutoModelForMaskedLM, ATTENTION + PLAIN),
    "electra": (lambda: hf.ElectraConfig(**BERT, embedding_size=8), hf.AutoModelForMaskedLM, ATTENTION + PLAIN),
    "distilbert": (
        lambda: hf.DistilBertConfig(
            vocab_size=40, dim=16, hidden_dim=32, n_layers=3, n_heads=4, max_position_embeddings=12
        ),
        hf.AutoModelForMaskedLM,
        ATTENTION + PLAIN,
    ),
    "vit": (lambda: hf.ViTConfig(**VISION), hf.AutoModelForImageClassification, ATTENTION + PLAIN),
    "clip": (_clip, hf.AutoModel, ATTENTION + PLAIN),
    "t5": (lambda: hf.T5Config(**T5), hf.AutoModelForSeq2SeqLM, ATTENTION + PLAIN),
    "t5-gated": (
        lambda: hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        hf.AutoModelForSeq2SeqLM,
        ATTENTION + GATED,
    ),
    "opt": (
        lambda: hf.OPTConfig(**BERT, ffn_dim=32, word_embed_proj_dim=8),
        hf.AutoModelForCausalLM,
        ATTENTION + PLAIN,
    ),
    "whisper": (lambda: hf.WhisperConfig(**WHISPER), hf.AutoModelForSpeechSeq2Seq, ATTENTION + PLAIN),
    "gpt2": (lambda: hf.GPT2Config(**GPT2), hf.AutoModelForCausalLM, ATTENTION + PLAIN),
    "neox": (lambda: hf.GPTNeoXConfig(**BERT), hf.AutoModelForCausalLM, ATTENTION + PLAIN),
    "qwen3-moe": (lambda: hf.Qwen3MoeConfig(**MOE), hf.AutoModelForCausalLM, ATTENTION + 4 * GATED),
    "mixtral": (lambda: hf.MixtralConfig(**MOE), hf.AutoModelForCausalLM, ATTENTION + 4 * GATED),
}
ENCODER_DECODER = {"t5", "t5-gated", "whisper"}


def _build(family: str) -> tuple[nn.Module, Any]:
    make_config, auto, _ = FAMILIES[family]
    config = make_config()
    torch.manual_seed(0)
    return auto.from_config(config), config


def _select(model: nn.Module, catalogue: Callable[..., list[TensorInfo]], **options: Any) -> Selection:
    config = getattr(model, "config", None)
    return select_modules(catalogue(model.state_dict()), config=None if config is None else config.to_dict(), **options)


def _block_of(model: nn.Module, name: str) -> int | None:
    """Index inside the outermost nn.ModuleList that holds the module."""
    segments = name.split(".")
    for depth in range(1, len(segments)):
        if isinstance(model.get_submodule(".".join(segments[:depth])), nn.ModuleList):
            return int(segments[depth])
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_appears_exactly_once(family: str, catalogue: Callable[..., list[TensorInfo]]) -> None:
    model, _ = _build(family)
    selection = _select(model, catalogue)
    names = {module.parameter for module in selection.modules} | {tensor.name for tensor in selection.skipped}
    assert names == set(model.state_dict())
    assert not {module.parameter for module in selection.modules} & {tensor.name for tensor in selection.skipped}
    sizes = Counter[str]()
    for module in selection.modules:
        sizes[module.parameter] += math.prod(module.shape)
        assert module.stored_shape == tuple(model.state_dict()[module.parameter].shape)
        assert module.dtype == "float32"
        if module.view is None:
            assert isinstance(model.get_submodule(module.name), nn.Linear | nn.Conv1d | Conv1D)
    assert all(size == model.state_dict()[name].numel() for name, size in sizes.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_in_blocks_are_scored_with_their_layer(family: str, catalogue: Callable[..., list[TensorInfo]]) -> None:
    model, _ = _build(family)
    selection = _select(model, catalogue)
    layers = {module.parameter: module.layer for module in selection.modules}
    found = 0
    for name, owner in model.named_modules():
        block = _block_of(model, name)
        if not isinstance(owner, nn.Linear | Conv1D) or block is None:
            continue
        found += 1
        assert layers[f"{name}.weight"] == block
    assert found


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_of_a_block(family: str, catalogue: Callable[..., list[TensorInfo]]) -> None:
    model, _ = _build(family)
    modules = [module for module in _select(model, catalogue).modules if module.layer is not None]
    roles = FAMILIES[family][2]
    stacks = 2 if family in ENCODER_DECODER or family == "clip" else 1
    expected = {role: 3 * stacks * count for role, count in Counter(roles).items()}
    if family in ENCODER_DECODER:
        expected |= dict.fromkeys(CROSS, 3)
    assert Counter(module.role for module in modules) == expected
    assert {module.layer for module in modules} == {0, 1, 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_heads_are_left_out(family: str, catalogue: Callable[..., list[TensorInfo]]) -> None:
    model, _ = _build(family)
    reasons = {tensor.name: tensor.reason for tensor in _select(model, catalogue).skipped}
    embeddings = [name for name, owner in model.named_modules() if isinstance(owner, nn.Embedding)]
    for name in embeddings:
        reason = reasons[f"{name}.weight"]
        assert "embedding" in reason or reason == "position table"
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        (name,) = (name for name, owner in model.named_modules() if owner is head)
        assert reasons[f"{name}.weight"].startswith("language-model head")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name in reasons:
            assert reasons[name] == "1-D (norm or bias)"


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_come_in_the_order_in_which_the_model_runs(
    family: str, catalogue: Callable[..., list[TensorInfo]]
) -> None:
    model, _ = _build(family)
    modules = [module for module in _select(model, catalogue).modules if module.layer is not None]
    stacks = list(dict.fromkeys(module.name.split(f".{module.layer}.")[0] for module in modules))
    rank = {role: place for place, role in enumerate(ATTENTION + CROSS + GATED)}
    keys = [
        (
            stacks.index(module.name.split(f".{module.layer}.")[0]),
            module.layer,
            -1 if module.expert is None else module.expert,
            rank[module.role],
        )
        for module in modules
    ]
    assert keys == sorted(keys)
    if family in ENCODER_DECODER:
        assert ["encoder" in stack for stack in stacks] == [True, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_the_tensors_changes_nothing(family: str, catalogue: Callable[..., list[TensorInfo]]) -> None:
    model, config = _build(family)
    tensors = catalogue(model.state_dict())
    for known in (None, config.to_dict()):
        expected = select_modules(tensors, config=known)
        for seed in range(3):
            random.Random(seed).shuffle(tensors)
            assert select_modules(tensors, config=known) == expected


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("phi3", "neox")])
def test_without_a_configuration_the_names_and_shapes_tell(
    family: str, catalogue: Callable[..., list[TensorInfo]]
) -> None:
    model, _ = _build(family)
    assert select_modules(catalogue(model.state_dict())) == _select(model, catalogue)


@pytest.mark.parametrize("family", ["phi3", "neox"])
def test_what_needs_a_configuration_is_not_split_without(
    family: str, catalogue: Callable[..., list[TensorInfo]]
) -> None:
    model, _ = _build(family)
    selection = select_modules(catalogue(model.state_dict()))
    reasons = [tensor.reason for tensor in selection.skipped if tensor.reason.startswith("fused")]
    assert len(reasons) == 3
    assert all(
        reason.endswith("put config.json beside the file, or keep it whole (--no-split-fused)") for reason in reasons
    )


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "gpt2"])
def test_wrapped_names_give_the_same_roles(family: str, catalogue: Callable[..., list[TensorInfo]]) -> None:
    model, _ = _build(family)
    plain = _select(model, catalogue)
    wrapped = select_modules(catalogue({f"_orig_mod.module.{name}": w for name, w in model.state_dict().items()}))
    assert [(m.name, m.role, m.layer) for m in wrapped.modules] == [
        (f"_orig_mod.module.{m.name}", m.role, m.layer) for m in plain.modules
    ]
    assert [tensor.reason for tensor in wrapped.skipped if "tied" not in tensor.reason] == [
        tensor.reason for tensor in plain.skipped if "tied" not in tensor.reason
    ]


def test_albert_has_one_layer_and_its_linears(catalogue: Callable[..., list[TensorInfo]]) -> None:
    model = hf.AutoModelForMaskedLM.from_config(hf.AlbertConfig(**BERT, embedding_size=8))
    selection = _select(model, catalogue)
    linears = {name for name, owner in model.named_modules() if isinstance(owner, nn.Linear)}
    heads = {"predictions.dense", "predictions.decoder"}
    assert {module.name for module in selection.modules} == linears - heads
    in_block = [module.role for module in selection.modules if module.layer == 0]
    assert in_block == [*ATTENTION, *PLAIN]


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_experts_of_a_live_model_are_told_apart(family: str, catalogue: Callable[..., list[TensorInfo]]) -> None:
    model, _ = _build(family)
    selection = _select(model, catalogue)
    experts = [module for module in selection.modules if module.layer == 1 and module.expert is not None]
    assert [(module.expert, module.role) for module in experts] == [(e, role) for e in range(4) for role in GATED]
    assert {tensor.name: tensor.reason for tensor in selection.skipped}["model.layers.1.mlp.gate.weight"] == "router"


def test_mamba_mixes_fused_and_single_projections(catalogue: Callable[..., list[TensorInfo]]) -> None:
    config = hf.MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2)
    selection = _select(hf.AutoModelForCausalLM.from_config(config), catalogue)
    roles = ("dt_proj", "in_proj_x", "in_proj_z", "out_proj", "x_proj")
    assert [(m.role, m.layer) for m in selection.modules] == [(role, layer) for layer in range(2) for role in roles]
    reasons = {tensor.name.rpartition("mixer.")[2]: tensor.reason for tensor in selection.skipped}
    assert reasons["conv1d.weight"].startswith("depthwise convolution")
    assert reasons["A_log"].startswith("state-space parameter")
    assert reasons["D"] == "1-D (norm or bias)"


def test_a_plain_network_is_scored_under_its_own_names(catalogue: Callable[..., list[TensorInfo]]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
            self.net1d = nn.Sequential(nn.Conv1d(4, 6, 5))
            self.volume = nn.Conv3d(2, 4, 3)
            self.up = nn.ConvTranspose2d(4, 8, 2)
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(11)])
            self.vector = nn.Linear(4, 1)
            self.kernel = nn.Parameter(torch.zeros(4, 5))
            self.norm = nn.BatchNorm2d(8)
            self.table = nn.Parameter(torch.zeros(4, 5, 6))

    selection = _select(Net(), catalogue)
    found = {module.name: (module.role, module.layer, module.kind) for module in selection.modules}
    assert found == {
        "stem": ("stem", None, "conv"),
        "net.0": ("linear", None, "linear"),
        "net.2": ("linear", None, "linear"),
        "net1d.0": ("conv", None, "conv"),
        "volume": ("volume", None, "conv"),
        "up": ("up", None, "conv"),
        "vector": ("vector", None, "linear"),
        "kernel": ("kernel", None, "linear"),
        **{f"layers.{index}": ("linear", index, "linear") for index in range(11)},
    }
    layers = [module.layer for module in selection.modules if module.name.startswith("layers")]
    assert layers == list(range(11))
    reasons = {tensor.name: tensor.reason for tensor in selection.skipped}
    assert reasons["depthwise.weight"].startswith("convolution with one input channel")
    assert reasons["table"] == "3-D parameter (4x5x6) of unknown layout"
    assert reasons["norm.num_batches_tracked"] == "running statistics of a normalisation"


def test_torch_transformer_and_recurrent_layers(catalogue: Callable[..., list[TensorInfo]]) -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2)
    selection = _select(decoder, catalogue)
    assert [(module.role, module.layer) for module in selection.modules] == [
        (role, layer) for layer in range(2) for role in (*ATTENTION, *CROSS, *PLAIN)
    ]
    for make, gates in ((nn.LSTM, 4), (nn.GRU, 3)):
        recurrent = _select(make(6, 5, bidirectional=True), catalogue)
        assert len(recurrent.modules) == 4 * gates
        assert {module.shape for module in recurrent.modules} == {(5, 6), (5, 5)}
        assert "weight_ih_l0_reverse.new_gate" in {m.name for m in recurrent.modules} or make is nn.LSTM
    assert {module.role for module in _select(nn.RNN(6, 5), catalogue).modules} == {"weight_ih_l0", "weight_hh_l0"}


def test_a_single_linear_has_a_module_name(catalogue: Callable[..., list[TensorInfo]]) -> None:
    (module,) = _select(nn.Linear(3, 4), catalogue).modules
    assert (module.name, module.parameter, module.role) == ("weight", "weight", "linear")
