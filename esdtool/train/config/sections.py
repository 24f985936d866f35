"""The sections of a training configuration, as pydantic models: one per table of the TOML file.

The text under each field is its documentation: it goes into the JSON Schema (`esdtool schema train`) and the reference
pages. Where the keys of a section depend on a choice (`data.source`, `optimizer.name`, `schedule.name`), each choice is
a model of its own and the section is one of them. [weight_decay] is in `esdtool.train.policies`, one file a policy.
Nothing heavy is imported.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from esdtool.train.config.one_of import OneOf
from esdtool.train.config.presets import PRESETS
from esdtool.train.config.section import (
    Betas,
    Count,
    Fraction,
    Momentum,
    Positive,
    Section,
    Seed,
    Strings,
    Text,
)


class ModelSettings(Section):
    """[model] What is trained: exactly one of preset, config and from."""

    preset: Text | None = Field(default=None, json_schema_extra={"enum": [*PRESETS, None]})
    """Name of a built-in LLaMA, e.g. `llama-60m`; randomly initialised from run.seed."""
    config: Text | None = None
    """Path of a transformers config.json (or its folder) of any causal language model; randomly initialised."""
    from_: Text | None = Field(default=None, alias="from")
    """Checkpoint directory or Hub id whose weights the training continues from."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _exactly_one("model", preset=self.preset, config=self.config, **{"from": self.from_})
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"model.preset {self.preset!r} is not known; choose from {', '.join(PRESETS)}")
        return self


class CommonData(Section):
    """Keys of [data] that every source has."""

    source: str
    """Where the text comes from."""
    packing: Literal["document", "dense"] = "dense"
    """`document`: one document a row, cut and padded to batch.sequence_length, the loss ignores padding (the
    paper's). `dense`: documents joined by the end-of-text token and cut into full rows."""
    seed: Seed | None = None
    """Seed of the data order alone; default: run.seed, which then decides both initial weights and data order."""
    validation_fraction: Fraction | None = None
    """Fraction of the documents held out, chosen by a hash of their text, whatever the seed. Default 0.02, unless
    files or a split of their own are given for validation."""


class StdlibData(CommonData):
    """Python's own library source, present on every machine."""

    source: Literal["stdlib"] = "stdlib"
    """`stdlib`: Python's own library source."""


class FilesData(CommonData):
    """Local files."""

    source: Literal["files"]
    """`files`: local files."""
    files: Strings
    """One glob or a list; .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet. Relative to the working directory; `**`
    descends into folders."""
    txt_document: Literal["file", "line", "paragraph"] = "file"
    """What one document of a .txt file is: the whole file, a line, or a paragraph (up to an empty line)."""
    text_column: Text = "text"
    """Column of .jsonl and .parquet files that holds the text."""
    validation_files: Strings | None = None
    """Globs of the validation text; then nothing is held out of `files`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.files:
            raise ValueError('data.source = "files" needs data.files')
        _one_at_most("data", validation_fraction=self.validation_fraction, validation_files=self.validation_files)
        return self


class HubData(CommonData):
    """A dataset of the Hugging Face Hub, or a local one that `datasets` can load."""

    source: Literal["huggingface"]
    """`huggingface`: a dataset of the Hub or a local one that `datasets` can load."""
    dataset: Text
    """The dataset's name, e.g. `allenai/c4`."""
    name: Text | None = None
    """The dataset's configuration, e.g. `en`."""
    revision: Text | None = None
    """Commit or tag of the dataset; the default is its main branch."""
    split: Text = "train"
    """The split to train on."""
    streaming: bool = True
    """Read while training (true), or download the whole dataset first (false)."""
    text_column: Text = "text"
    """Column that holds the text."""
    shuffle_block: Count = 8192
    """Streaming only: documents that are read together and shuffled among themselves. A local corpus is shuffled
    as a whole."""
    prefetch: Annotated[int, Field(ge=0)] = 2
    """Streaming only: batches prepared ahead in a background thread; 0: none."""
    validation_split: Text | None = None
    """The validation split; then nothing is held out of `split`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _one_at_most("data", validation_fraction=self.validation_fraction, validation_split=self.validation_split)
        if self.validation_split is not None and self.validation_split == self.split:
            raise ValueError(
                f'data.validation_split is data.split ("{self.split}"): the model would be tested on its training text'
            )
        return self


DataSettings = Annotated[StdlibData | FilesData | HubData, OneOf("source", default="stdlib")]
"""[data] The text, how it becomes rows, and what is held out for validation."""


class TokenizerSettings(Section):
    """[tokenizer] Text to tokens: exactly one of name, file and train_vocab_size; none to take that of model.from.

    Each document starts with the tokenizer's begin-of-text token if the tokenizer itself
    adds one, and always ends with its end-of-text token. Special tokens spelt out in the
    text (`<|endoftext|>` in a source file) are encoded as the ordinary characters they are.
    """

    name: Text | None = None
    """Hub id, e.g. `google-t5/t5-base`."""
    file: Text | None = None
    """Path of a tokenizer.json, or of a folder that holds a saved tokenizer."""
    train_vocab_size: Annotated[int, Field(ge=260)] | None = None
    """Train a byte-level BPE of this many tokens (256 bytes and the end-of-text token included) on the training
    documents; cached by their content."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _one_at_most("tokenizer", name=self.name, file=self.file, train_vocab_size=self.train_vocab_size)
        return self


class BatchSettings(Section):
    """[batch] Sizes, in sequences and tokens."""

    global_size: Count = 512
    """Sequences per optimizer step, over all ranks."""
    micro_size: Count = 32
    """Sequences per forward pass of one rank; the rest is gradient accumulation."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens per sequence."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.global_size % self.micro_size:
            raise ValueError(
                f"batch.global_size {self.global_size} is not divisible by batch.micro_size {self.micro_size}"
            )
        return self


class CommonOptimizer(Section):
    """Keys of [optimizer] that every update rule has."""

    name: str
    """The update rule."""
    lr: Positive = 1e-3
    """Peak learning rate."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of Adam's first and second moment."""
    eps: Positive = 1e-8
    """Adam's epsilon."""
    max_grad_norm: Positive | None = None
    """Clip the gradient to this 2-norm; the default is no clipping, as in the paper."""


class AdamWSettings(CommonOptimizer):
    """AdamW: decoupled decay."""

    name: Literal["adamw"] = "adamw"
    """`adamw`: decoupled decay."""


class AdamSettings(CommonOptimizer):
    """Adam with L2 decay, added to the gradient."""

    name: Literal["adam"]
    """`adam`: L2 decay, added to the gradient."""


class MuonSettings(CommonOptimizer):
    """Muon for the 2-D matrices of the transformer blocks, AdamW for the rest."""

    name: Literal["muon"]
    """`muon`: Muon for the 2-D matrices of the transformer blocks, AdamW for the rest."""
    muon_lr: Positive | None = None
    """Peak learning rate of the matrices, in units of AdamW's update RMS; default: lr."""
    muon_momentum: Momentum = 0.95
    """Momentum."""


OptimizerSettings = Annotated[AdamWSettings | AdamSettings | MuonSettings, OneOf("name", default="adamw")]
"""[optimizer] The update rule."""


class CommonSchedule(Section):
    """Keys of [schedule] that every shape has."""

    name: str
    """Shape after the warm-up."""
    steps: Count
    """Optimizer steps of the whole run."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up from 0; default: a tenth of steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Final learning rate over peak learning rate."""

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if (warmup := self.warmup_steps or 0) > self.steps:
            raise ValueError(f"schedule.warmup_steps {warmup} is more than schedule.steps {self.steps}")
        return self


class CosineSchedule(CommonSchedule):
    """Half a cosine from the peak to the final learning rate."""

    name: Literal["cosine"] = "cosine"
    """`cosine`: half a cosine."""


class LinearSchedule(CommonSchedule):
    """A straight line from the peak to the final learning rate."""

    name: Literal["linear"]
    """`linear`: a straight line."""


class WsdSchedule(CommonSchedule):
    """Warm-up, stable, decay: constant, then a straight line over the last decay_steps."""

    name: Literal["wsd"]
    """`wsd`: constant, then linear decay over the last decay_steps."""
    decay_steps: Count | None = None
    """Steps of the final decay; default: a tenth of steps."""

    @model_validator(mode="after")
    def _check_decay(self) -> Self:
        warmup, decay = self.warmup_steps or 0, self.decay_steps or 0
        if warmup + decay > self.steps:
            raise ValueError(
                f"schedule.warmup_steps {warmup} + schedule.decay_steps {decay} "
                f"is more than schedule.steps {self.steps}"
            )
        return self


ScheduleSettings = Annotated[CosineSchedule | LinearSchedule | WsdSchedule, OneOf("name", default="cosine")]
"""[schedule] The learning rate over the steps."""


class PrecisionSettings(Section):
    """[precision] Number formats."""

    name: Literal["float32", "bf16-autocast", "bf16"] = "float32"
    """`float32`; `bf16-autocast`: float32 weights, bfloat16 products; `bf16`: weights and optimizer state in
    bfloat16, as the paper's code."""


class EvalSettings(Section):
    """[eval] Validation loss."""

    every: Count = 1000
    """Steps between two evaluations; the end of the run is always evaluated."""
    tokens: Count = 1_000_000
    """Token budget: rows of the validation text, in order, until they hold this many targets."""
    micro_size: Count | None = None
    """Sequences per forward pass; default: batch.micro_size."""
    average: Fraction | None = None
    """Part of the steps, at the end of the run, over which the weights are averaged: 0.1 for the last tenth. Their mean
    is evaluated at the end beside the final weights, and not saved. Default: no average."""


class CheckpointSettings(Section):
    """[checkpoint] What is saved, and how much of it is kept."""

    every: Count = 1000
    """Steps between two checkpoints; the end of the run and SIGTERM or SIGINT save one too."""
    keep: Count = 2
    """Checkpoints that are kept, the newest first."""
    final_dtype: Literal["as-trained", "float32", "bfloat16", "float16"] = "as-trained"
    """Storage dtype of RUN/final; the checkpoints to resume from stay as trained."""


class LoggingSettings(Section):
    """[logging] Where the numbers go, besides metrics.jsonl and decay.jsonl."""

    every: Count = 10
    """Steps between two lines of training metrics."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run directory."""
    wandb: bool = False
    """Log to Weights & Biases (needs the `wandb` package)."""
    wandb_project: Text = "esdtool"
    """wandb: project name."""
    wandb_name: Text | None = None
    """wandb: name of the run; default: the run directory's, of a run of a sweep `SETTING/seed-N`."""
    wandb_tags: Strings = ()
    """wandb: tags of the run, one or a list."""


class RunSettings(Section):
    """[run] The run itself."""

    dir: Text | None = None
    """Run directory, relative to the working directory; default: `runs/` and the names of the config files."""
    seed: Seed = 0
    """Seed of initial weights and, unless data.seed is given, of the data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if there is one."""
    distributed: Literal["ddp", "fsdp2"] = "ddp"
    """With several ranks: whole model on each (ddp), or sharded (fsdp2)."""
    compile: bool = False
    """Compile the model with torch.compile."""
    threads: Count | None = None
    """CPU threads of one rank; default: torch's own choice."""


def _one_at_most(section: str, **alternatives: object) -> bool:
    """Refuse keys that exclude each other. Returns whether one is given."""
    given = [key for key, value in alternatives.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{section}.{given[0]} and {section}.{given[1]} exclude each other: give one of them")
    return bool(given)


def _exactly_one(section: str, **alternatives: object) -> None:
    if not _one_at_most(section, **alternatives):
        *first, last = (f"{section}.{key}" for key in alternatives)
        raise ValueError(f"one of {', '.join(first)} and {last} is needed")
