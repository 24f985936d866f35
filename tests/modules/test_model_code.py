"""The model's own code settles what names and shapes leave open."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import esdtool
from esdtool.checkpoint import from_model
from esdtool.checkpoint.base import TensorInfo
from esdtool.modules import IdentifiedBy, SkipKind, select_modules
from esdtool.modules.model_code import ParameterKind, kinds_of, kinds_of_architecture, plain_name


class Net(nn.Module):
    """Names that tell nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.lookup = nn.Embedding(20, 8)
        self.wide = nn.Conv1d(6, 10, 20)
        self.gain = nn.Parameter(torch.zeros(5, 4))


def test_a_live_model_tells() -> None:
    checkpoint = from_model(Net())
    selection = select_modules(checkpoint.tensors.values(), kinds=functools.partial(kinds_of, checkpoint))
    assert {module.name: (module.identified_by, module.kind) for module in selection.modules} == {
        "first": (IdentifiedBy.MODEL, "linear"),
        "wide": (IdentifiedBy.MODEL, "conv"),
        "gain": (IdentifiedBy.SHAPE, "linear"),
    }
    kinds = {entry.name: entry.kind for entry in selection.skipped}
    assert kinds["lookup.weight"] is SkipKind.EMBEDDING


def test_the_model_is_asked_only_where_there_is_a_doubt(catalogue: Callable[..., list[TensorInfo]]) -> None:
    def never() -> dict[str, ParameterKind]:
        raise AssertionError("asked")

    tensors = catalogue({"model.layers.0.self_attn.q_proj.weight": (8, 8), "model.embed_tokens.weight": (40, 8)})
    (module,) = select_modules(tensors, kinds=never).modules
    assert module.identified_by is IdentifiedBy.FAMILY


def test_transformers_tells_of_a_file(tmp_path: Path) -> None:
    """Convolutions of a ResNet have names of their own: the oracle is the live model's structure."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=3)
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(tmp_path)
    analysis = esdtool.analyze(tmp_path, min_eigs=2, jobs=1, cache=False)
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert {module.name for module in analysis.modules} == convolutions
    assert {module.identified_by for module in analysis.modules} <= {IdentifiedBy.MODEL, IdentifiedBy.FAMILY}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "no_such_model"},
        {"model_type": 7},
        {"model_type": "llama", "num_hidden_layers": 10**9},
        {"model_type": "bert", "num_labels": 10**9},
        {"model_type": "llama", "hidden_size": "wide"},
        {"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}, "num_hidden_layers": 10**6},
    ],
)
def test_a_configuration_that_fits_nothing_tells_nothing(config: dict[str, object]) -> None:
    assert kinds_of_architecture(config, num_tensors=20) == {}


CONFIGS = {
    "llama": transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=40, num_attention_heads=4
    ),
    "gpt2": transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=40),
    "bert": transformers.BertConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=40
    ),
    "t5": transformers.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=40),
    "opt": transformers.OPTConfig(
        hidden_size=24, ffn_dim=32, num_hidden_layers=2, vocab_size=40, word_embed_proj_dim=24
    ),
    "vit": transformers.ViTConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, image_size=8, patch_size=4
    ),
}
SCORED = {ParameterKind.LINEAR, ParameterKind.CONVOLUTION}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_rules_agree_with_the_models_code(family: str, catalogue: Callable[..., list[TensorInfo]]) -> None:
    """What the rules score are weights of linear layers and convolutions; embeddings, heads and norms are left out."""
    config = CONFIGS[family]
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    checkpoint = from_model(model)
    kinds = kinds_of(checkpoint)
    selection = select_modules(checkpoint.tensors.values(), config=config.to_dict())
    for module in selection.modules:
        assert kinds[plain_name(module.parameter)] in SCORED
    for entry in selection.skipped:
        if kinds.get(plain_name(entry.name)) is ParameterKind.LINEAR:
            assert len(entry.shape) == 1 or entry.kind in (SkipKind.OUTPUT_HEAD, SkipKind.ROUTER)
