"""Estimate what a run will need from its configuration alone, for `esdtool train --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from esdtool.train.config.train_config import TrainConfig
from esdtool.train.model import model_config, unallocated_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Sizes of a run. Bytes are per rank."""

    parameters: int
    """All parameters; tied ones once."""
    block_parameters: int
    """Parameters outside the embedding and the lm_head."""
    tokens_per_step: int
    """Positions of one global batch, padding included."""
    total_tokens: int
    """Positions of the whole run."""
    micro_batches_per_step: int
    """Forward passes per step and rank."""
    weight_bytes: int
    """Weights."""
    gradient_bytes: int
    """Gradients, in the weights' dtype."""
    optimizer_bytes: int
    """Moments of the optimizer, in the weights' dtype."""
    activation_bytes: int
    """What the backward pass of one micro-batch keeps: a rough figure."""

    @property
    def total_bytes(self) -> int:
        """Memory of one rank at its peak, without the allocator's and the framework's own."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def estimate(config: TrainConfig, *, vocab_size: int, world_size: int = 1) -> Estimate:
    """Parameters exactly, memory roughly. No weight is allocated.

    Args:
        config: the run.
        vocab_size: tokens of the tokenizer.
        world_size: ranks; fsdp2 shards weights, gradients and moments over them.

    Raises:
        ConfigError: as `esdtool.train.model.build_model`.
    """
    model = unallocated_model(config, vocab_size=vocab_size)
    architecture = model_config(config, vocab_size=vocab_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    item = 2 if config.precision.name == "bf16" else 4
    shards = world_size if config.run.distributed == "fsdp2" else 1
    weight_bytes = -(-parameters * item // shards)
    return Estimate(
        parameters=parameters,
        block_parameters=parameters - _embedding_parameters(model),
        tokens_per_step=config.tokens_per_step,
        total_tokens=config.tokens_per_step * config.schedule.steps,
        micro_batches_per_step=config.batch.global_size // (config.batch.micro_size * world_size),
        weight_bytes=weight_bytes,
        gradient_bytes=weight_bytes,
        # Cautious decay keeps a copy of the weights while the optimizer steps.
        optimizer_bytes=-(-_moments(config, model) * item // shards) + weight_bytes * config.weight_decay.cautious,
        activation_bytes=_activation_bytes(config, architecture),
    )


def _embedding_parameters(model: PreTrainedModel) -> int:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(end, "weight", None) for end in ends]
    # Tied ones are one parameter.
    sizes = {id(weight): weight.numel() for weight in weights if isinstance(weight, torch.Tensor)}
    return sum(sizes.values())


def _moments(config: TrainConfig, model: PreTrainedModel) -> int:
    """Numbers that the optimizer keeps: two per parameter, but one per matrix that Muon updates."""
    total = 2 * sum(parameter.numel() for parameter in model.parameters())
    if config.optimizer.name != "muon":
        return total
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    return total - (matrices - _embedding_parameters(model))


def _activation_bytes(config: TrainConfig, architecture: PretrainedConfig) -> int:
    """Tensors that autograd keeps in a LLaMA block, as counted with saved-tensor hooks, and those of the loss.

    Per token and block: 4 vectors of the intermediate size and 11 of the hidden size (13
    in bfloat16, whose norms keep float32 copies). At the peak, the logits, their float32
    copy and its gradient. A model of another kind differs by a factor of two or so.
    """
    text = architecture.get_text_config()
    hidden = int(text.hidden_size)
    intermediate = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    layers = int(text.num_hidden_layers)
    item, vectors = (4, 11) if config.precision.name == "float32" else (2, 13)
    tokens = config.batch.micro_size * config.batch.sequence_length
    block = (vectors * hidden + 4 * intermediate) * item
    logits = int(text.vocab_size) * (item + 2 * 4)
    blocks = block + layers * hidden * item if config.model.activation_checkpointing else layers * block
    return tokens * (blocks + logits)
