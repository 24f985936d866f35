"""The model of a run: built from a preset or a config.json, or loaded from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from esdtool.errors import ConfigError
from esdtool.train.config.presets import PRESETS
from esdtool.train.config.train_config import TrainConfig
from esdtool.train.pretrained import build_random, import_transformers, load_model, read_architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


def build_model(
    config: TrainConfig, *, vocab_size: int, tokenizer: PreTrainedTokenizerFast | None = None
) -> PreTrainedModel:
    """Return the model in float32 on the CPU, in train mode; the same on every rank and for every device.

    Random weights come from run.seed alone; torch's global generator is left as it was.
    Pass `use_cache=False` to its forward.

    Args:
        config: model, seed and sequence length.
        vocab_size: tokens that the tokenizer gives (`Data.vocab_size`).
        tokenizer: its begin- and end-of-text ids are written into a new model's configuration.

    Raises:
        ConfigError: if the model cannot be had, or its vocabulary or its positions are too few.
    """
    architecture = model_config(config, vocab_size=vocab_size, tokenizer=tokenizer)
    if config.model.from_ is not None:
        model = _load(config.model.from_)
    else:
        # CPU and float32 whatever the caller's defaults are: the numbers drawn depend on both.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), _default_dtype(torch.float32):
            torch.manual_seed(config.run.seed)
            model = _from_architecture(architecture, config)
    # `.float()`: a config.json or a checkpoint may ask for another dtype.
    model.float().train()
    if config.model.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(f"model.activation_checkpointing: {type(model).__name__} does not support it")
        # Newer releases of transformers have the first name, older ones the second.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    return model


def unallocated_model(config: TrainConfig, *, vocab_size: int) -> PreTrainedModel:
    """Return the model's shape without its weights: every parameter is on torch's meta device.

    Raises:
        ConfigError: as `build_model`.
    """
    with torch.device("meta"):
        return _from_architecture(model_config(config, vocab_size=vocab_size), config)


def model_config(
    config: TrainConfig, *, vocab_size: int, tokenizer: PreTrainedTokenizerFast | None = None
) -> PretrainedConfig:
    """Return the transformers configuration of [model], checked against the tokenizer and the sequence length.

    Raises:
        ConfigError: if it cannot be had, or the vocabulary or the positions are too few.
    """
    settings = config.model
    if settings.preset is not None:
        architecture = _preset_config(settings.preset, vocab_size)
        what = f"model.preset {settings.preset}"
    elif settings.config is not None:
        what = f"model.config {settings.config}"
        if not Path(settings.config).exists():
            raise ConfigError(f"{what}: no such file or folder")
        architecture = _read_config(settings.config, what)
    else:
        assert settings.from_ is not None
        what = f"model.from {settings.from_}"
        architecture = _read_config(settings.from_, what)
    text = architecture.get_text_config()
    if text.vocab_size < vocab_size:
        raise ConfigError(
            f"{what}: its vocabulary of {text.vocab_size} is smaller than the tokenizer's {vocab_size}; "
            "choose the model's own tokenizer"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and positions < config.batch.sequence_length:
        raise ConfigError(
            f"batch.sequence_length {config.batch.sequence_length} is more than the {positions} positions of {what}"
        )
    if tokenizer is not None and settings.from_ is None:
        # Not pad_token_id: the embedding of that token would be held at zero, and it may be the end of text.
        architecture.bos_token_id = tokenizer.bos_token_id
        architecture.eos_token_id = tokenizer.eos_token_id
    return architecture


def _preset_config(name: str, vocab_size: int) -> PretrainedConfig:
    preset = PRESETS[name]
    architecture: PretrainedConfig = import_transformers().LlamaConfig(
        vocab_size=preset.vocab_size or vocab_size,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_attention_heads=preset.num_attention_heads,
        num_hidden_layers=preset.num_hidden_layers,
        max_position_embeddings=preset.max_position_embeddings,
        rms_norm_eps=preset.rms_norm_eps,
        initializer_range=preset.initializer_range,
        tie_word_embeddings=False,
    )
    return architecture


def _read_config(path: str, what: str) -> PretrainedConfig:
    architecture = read_architecture(path, what)
    if not hasattr(architecture.get_text_config(), "vocab_size"):
        raise ConfigError(f"{what}: {architecture.model_type!r} is not a language model")
    return architecture


def _from_architecture(architecture: PretrainedConfig, config: TrainConfig) -> PreTrainedModel:
    return build_random(architecture, str(config.model.config or config.model.from_ or config.model.preset))


def _load(path: str) -> PreTrainedModel:
    what = f"model.from {path}"
    try:
        model, missing = load_model(path)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error
    if missing:
        # transformers would go on with random weights in their place.
        raise ConfigError(f"{what}: {len(missing)} weights are not in the checkpoint, e.g. {missing[0]}")
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
