from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from esdtool.errors import ConfigError
from esdtool.train.config.presets import PRESETS
from esdtool.train.estimate import estimate
from esdtool.train.model import build_model, unallocated_model


@pytest.mark.parametrize(
    ("name", "hidden", "intermediate", "heads", "layers"),
    [
        ("llama-60m", 512, 1376, 8, 8),
        ("llama-130m", 768, 2048, 12, 12),
        ("llama-350m", 1024, 2736, 16, 24),
        ("llama-1b", 2048, 5461, 32, 24),
    ],
)
def test_the_papers_models(settings: Any, name: str, hidden: int, intermediate: int, heads: int, layers: int) -> None:
    model = unallocated_model(settings(model={"preset": name}), vocab_size=300)
    config = model.config
    assert (config.hidden_size, config.intermediate_size) == (hidden, intermediate)
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (heads, heads, layers)
    assert (config.vocab_size, config.rms_norm_eps, config.initializer_range) == (32000, 1e-6, 0.02)
    assert not config.tie_word_embeddings
    # Counted by hand: embedding and head, and per block four square projections, three of the MLP, two norms.
    block = 4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden
    expected = 2 * 32000 * hidden + layers * block + hidden
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_every_module_of_every_preset_has_a_spectrum_worth_fitting(name: str) -> None:
    preset = PRESETS[name]
    assert min(preset.hidden_size, preset.intermediate_size) >= 128
    assert preset.hidden_size % preset.num_attention_heads == 0
    assert (preset.hidden_size // preset.num_attention_heads) % 2 == 0


def test_small_presets_take_the_tokenizers_vocabulary(settings: Any) -> None:
    assert build_model(settings(), vocab_size=300).config.vocab_size == 300


def test_the_weights_are_those_of_the_seed(settings: Any) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    one = build_model(settings(run={"seed": 3}), vocab_size=300)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    torch.set_default_dtype(torch.float64)
    try:
        two = build_model(settings(run={"seed": 3}), vocab_size=300)
    finally:
        torch.set_default_dtype(torch.float32)
    other = build_model(settings(run={"seed": 4}), vocab_size=300)
    for (name, weight), again, different in zip(
        one.named_parameters(), two.parameters(), other.parameters(), strict=True
    ):
        assert weight.dtype == again.dtype == torch.float32
        assert torch.equal(weight, again)
        assert weight.ndim == 1 or not torch.equal(weight, different), name
    assert one.training
    assert one.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_model_from_a_config_file(settings: Any, tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 64}
    GPT2Config(vocab_size=400, **sizes).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        model = build_model(settings(model={"config": str(path)}), vocab_size=300)
        assert type(model).__name__ == "GPT2LMHeadModel"
        assert model.config.vocab_size == 400


def test_training_goes_on_from_a_checkpoint(settings: Any, tmp_path: Path) -> None:
    saved = build_model(settings(run={"seed": 8}), vocab_size=300).bfloat16()
    saved.save_pretrained(tmp_path)
    loaded = build_model(settings(model={"from": str(tmp_path)}, tokenizer={}), vocab_size=300)
    assert isinstance(loaded, LlamaForCausalLM)
    for (name, weight), before in zip(loaded.named_parameters(), saved.parameters(), strict=True):
        assert weight.dtype == torch.float32, name
        assert torch.equal(weight, before.float()), name
    assert loaded.training


def test_end_of_text_is_written_into_a_new_model(settings: Any) -> None:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    model = build_model(settings(), vocab_size=300, tokenizer=tokenizer)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, 1)
    # With a padding index, the embedding of end-of-text would never be trained.
    assert model.get_input_embeddings().padding_idx is None


def test_activation_checkpointing_gives_the_same_gradient(settings: Any) -> None:
    ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for active in (False, True):
        model = build_model(settings(model={"preset": "llama-1m", "activation_checkpointing": active}), vocab_size=300)
        layers = model.model.layers
        assert all(layer.gradient_checkpointing == active for layer in layers)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def write_config(folder: Path, **keys: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys))
    return str(folder)


@pytest.mark.parametrize(
    ("model", "vocab_size", "expected"),
    [
        ({"preset": "llama-60m"}, 32100, "model.preset llama-60m: its vocabulary of 32000 is smaller than the"),
        ({"config": "SMALL"}, 300, "its vocabulary of 40 is smaller than the tokenizer's 300"),
        ({"config": "none.json"}, 40, "model.config none.json: no such file or folder"),
        ({"config": "NO MODEL TYPE"}, 40, "cannot read the model configuration"),
        ({"config": "BROKEN"}, 40, "cannot read the model configuration"),
        ({"config": "NO LANGUAGE MODEL"}, 40, "is not a language model"),
        ({"config": "ENCODER-DECODER"}, 40, "cannot build a causal language model"),
        ({"config": "SHORT"}, 40, "batch.sequence_length 16 is more than the 8 positions of model.config"),
        ({"from": "no-such-organisation/no-such-model"}, 40, "model.from no-such-organisation/no-such-model: cannot"),
        ({"from": "SMALL"}, 40, "cannot load the weights"),
        ({"from": "TRUNCATED"}, 40, "cannot load the weights"),
        ({"from": "NO HEAD"}, 40, "weights are not in the checkpoint, e.g. "),
    ],
)
def test_a_model_that_cannot_be_had(
    settings: Any, tmp_path: Path, model: dict[str, str], vocab_size: int, expected: str
) -> None:
    small = {"vocab_size": 40, "n_embd": 32, "n_head": 2, "n_layer": 1}
    folders = {
        "SMALL": write_config(tmp_path / "small", model_type="gpt2", **small),
        "SHORT": write_config(tmp_path / "short", model_type="gpt2", n_positions=8, **small),
        "NO MODEL TYPE": write_config(tmp_path / "untyped"),
        "NO LANGUAGE MODEL": write_config(tmp_path / "vit", model_type="vit"),
        "ENCODER-DECODER": write_config(tmp_path / "t5", model_type="t5", vocab_size=40),
        "BROKEN": write_config(tmp_path / "broken"),
        "TRUNCATED": write_config(tmp_path / "truncated", model_type="gpt2", **small),
        "NO HEAD": str(tmp_path / "bert"),
    }
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "truncated" / "model.safetensors").write_bytes(b"\x99" * 30)
    bert = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    BertModel(BertConfig(intermediate_size=32, **bert)).save_pretrained(tmp_path / "bert")
    keys = {key: folders.get(value, value) for key, value in model.items()}
    with pytest.raises(ConfigError) as caught:
        build_model(settings(model=keys), vocab_size=vocab_size)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_building_is_quiet_and_leaves_the_callers_verbosity(
    settings: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build_model(settings(), vocab_size=300).save_pretrained(tmp_path)
    capfd.readouterr()
    logging.set_verbosity_info()
    try:
        build_model(settings(model={"from": str(tmp_path)}, tokenizer={}), vocab_size=300)
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("precision", "item"), [("float32", 4), ("bf16-autocast", 4), ("bf16", 2)])
@pytest.mark.parametrize(("optimizer", "moments"), [("adam", 2.0), ("adamw", 2.0), ("muon", None)])
def test_estimated_sizes(settings: Any, precision: str, item: int, optimizer: str, moments: float | None) -> None:
    config = settings(precision={"name": precision}, optimizer={"name": optimizer})
    model = build_model(config, vocab_size=300)
    figures = estimate(config, vocab_size=300)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert figures.parameters == parameters
    assert figures.block_parameters == parameters - 2 * 300 * 128
    assert figures.weight_bytes == figures.gradient_bytes == parameters * item
    matrices = sum(layer.weight.numel() for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear))
    kept = 2 * parameters - matrices if moments is None else moments * parameters
    assert figures.optimizer_bytes == kept * item
    assert (figures.tokens_per_step, figures.total_tokens, figures.micro_batches_per_step) == (128, 1280, 4)


def test_sharding_divides_what_is_sharded(settings: Any) -> None:
    alone, shared = (
        estimate(settings(run={"distributed": mode}), vocab_size=300, world_size=2) for mode in ("ddp", "fsdp2")
    )
    assert shared.weight_bytes * 2 == alone.weight_bytes
    assert shared.activation_bytes == alone.activation_bytes
    assert alone.micro_batches_per_step == 2


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_activations_are_estimated_within_a_factor_of_two(settings: Any, precision: str) -> None:
    sizes = {"micro_size": 4, "sequence_length": 128}
    config = settings(model={"preset": "llama-3m"}, batch=sizes, precision={"name": precision})
    model = build_model(config, vocab_size=300)
    if precision == "bf16":
        model = model.bfloat16()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # The tensor too, so that its memory is not given to another.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.zeros(4, 128, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    measured = sum(size for size, _ in kept.values())
    assert measured / 2 < estimate(config, vocab_size=300).activation_bytes < measured * 2
