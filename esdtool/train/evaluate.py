"""Loss of a model on text: token-weighted, in eval mode, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from esdtool.train.config.loading import config_from_mapping
from esdtool.train.config.sections import DataSettings
from esdtool.train.config.train_config import TrainConfig
from esdtool.train.data.batches import BatchLayout, MicroBatch, ValidationBatches
from esdtool.train.data.open import open_corpus, open_validation, open_whole_corpus
from esdtool.train.data.packing import NO_TARGET
from esdtool.train.data.tokenizer import Encoder, load_tokenizer
from esdtool.train.distributed import TrainingRanks, open_ranks
from esdtool.train.model import build_model
from esdtool.train.run.log import perplexity


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of an evaluation."""

    loss: float
    """Mean cross entropy in nats per target."""
    num_targets: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


def summed_loss(model: nn.Module, batch: MicroBatch, *, device: torch.device, autocast: bool) -> torch.Tensor:
    """Sum of the cross entropies of a micro-batch's targets, a float32 scalar.

    Computed here from the logits, and in float32: a model's own loss is a mean, whose weight
    would depend on how the batch was split, and may hold further terms.

    Args:
        model: gives `logits` [rows, length, vocabulary].
        batch: `input_ids`, `labels` and perhaps `attention_mask`, each [rows, length].
        device: where the model is.
        autocast: run the model's products in bfloat16.
    """
    inputs = {key: value.to(device, non_blocking=True) for key, value in batch.items() if key != "labels"}
    # The labels are shifted, not the logits, which would have to be copied.
    targets = pad(batch["labels"][:, 1:], (0, 1), value=NO_TARGET).to(device, non_blocking=True)
    with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
        output: Any = model(**inputs, use_cache=False)
    logits = output.logits.float()
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="sum")


def evaluate(
    model: nn.Module, batches: ValidationBatches, *, ranks: TrainingRanks, autocast: bool, root: nn.Module | None = None
) -> Evaluation:
    """Return the mean loss over all validation targets. All ranks must call it.

    Args:
        model: what is called; its mode is restored afterwards.
        batches: equally many micro-batches on each rank, as sharded models need.
        ranks: who sums up.
        autocast: as in training.
        root: the model whose mode is switched, where `model` is a wrapper of it.
    """
    total = torch.zeros((), dtype=torch.float64)
    with _eval_mode(root or model), torch.no_grad():
        for batch in batches.micro_batches():
            total += summed_loss(model, batch, device=ranks.device, autocast=autocast).cpu()
    (loss,) = ranks.sum([float(total)])
    return Evaluation(loss=loss / batches.num_targets, num_targets=batches.num_targets)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """The options of `esdtool eval`."""

    checkpoint: str
    """Folder or Hub id of any causal language model of transformers."""
    data: DataSettings
    """The text."""
    held_out: bool = False
    """Only the part of the text that training would hold out; else all of it."""
    tokenizer: str | None = None
    """Folder, file or Hub id; None: the checkpoint's own."""
    sequence_length: int = 256
    micro_size: int = 16
    """Rows per forward pass."""
    tokens: int = 1_000_000
    """Budget of targets."""
    precision: Literal["float32", "bf16-autocast", "bf16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @classmethod
    def of_run(cls, checkpoint: str, config: TrainConfig) -> EvalRequest:
        """Return the validation of a training run, for any checkpoint."""
        return cls(
            checkpoint=checkpoint,
            data=config.data,
            held_out=True,
            sequence_length=config.batch.sequence_length,
            micro_size=config.eval_micro_size,
            tokens=config.eval.tokens,
            precision=config.precision.name,
            device=config.run.device,
        )


def evaluate_checkpoint(request: EvalRequest) -> Evaluation:
    """Perplexity of a checkpoint on a text, by the code that training uses. One process.

    Raises:
        ConfigError: for text, tokenizers and models that cannot be had or do not fit each other.
        DeviceError: if the device is not there.
    """
    config = _as_config(request)
    corpus = open_corpus(config.data).validation if request.held_out else open_whole_corpus(config.data)
    encoder = Encoder(load_tokenizer(config, corpus))
    with open_ranks(config) as ranks:
        layout = BatchLayout.from_config(config, pad=encoder.pad, rank=ranks.rank, world_size=ranks.world_size)
        batches = open_validation(corpus, encoder, layout, tokens=request.tokens, micro_size=request.micro_size)
        model = build_model(config, vocab_size=encoder.vocab_size)
        if request.precision == "bf16":
            to_bfloat16(model)
        model = model.to(ranks.device)  # type: ignore[arg-type] # transformers wraps nn.Module.to
        return evaluate(model, batches, ranks=ranks, autocast=request.precision == "bf16-autocast")


def to_bfloat16(model: nn.Module) -> None:
    """Convert the parameters, but not the buffers: rotary frequencies need float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def _as_config(request: EvalRequest) -> TrainConfig:
    """Return the settings in the form that the data and model code takes."""
    tokenizer = {}
    if request.tokenizer is not None:
        tokenizer = {"file" if Path(request.tokenizer).exists() else "name": request.tokenizer}
    return config_from_mapping(
        {
            "model": {"from": request.checkpoint},
            "data": request.data.model_dump(),
            "tokenizer": tokenizer,
            "batch": {
                "global_size": request.micro_size,
                "micro_size": request.micro_size,
                "sequence_length": request.sequence_length,
            },
            "schedule": {"steps": 1},
            "eval": {"tokens": request.tokens},
            "precision": {"name": request.precision},
            "run": {"device": request.device},
        },
        where="esdtool eval",
    )
