"""Every setting of a training run, as pydantic models: one per section of the TOML file.

The text under each field is its documentation: it goes into the JSON Schema
(`esdtool schema train`) and the reference pages. `esdtool.train.config.whole` joins the sections; reading
files, overrides and error messages are in `esdtool.train.config.files`. Imports nothing heavy.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from esdtool.assignment.options import Control
from esdtool.spectra.estimators import DEFAULT_ESTIMATOR
from esdtool.spectra.options import ScoreOptions, TrainingFitName
from esdtool.train.config.presets import PRESETS


def _one_or_many(value: Any) -> Any:
    """A single string stands for a list of one; a TOML array becomes a tuple."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Strings = Annotated[tuple[Text, ...], BeforeValidator(_one_or_many)]
Betas = Annotated[tuple[Momentum, Momentum], BeforeValidator(_one_or_many)]


class Section(BaseModel):
    """Base of all sections: immutable, exact types, no unknown key."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_by_alias=True,
        validate_by_name=True,
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


class DataSettings(Section):
    """[data] The text, how it becomes rows, and what is held out for validation."""

    source: Literal["stdlib", "files", "huggingface"] = "stdlib"
    """`stdlib`: Python's own library source, present on every machine. `files`: local files. `huggingface`: a
    dataset of the Hub or a local one that `datasets` can load."""
    files: Strings | None = None
    """source files: one glob or a list; .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet. Relative to the working
    directory; `**` descends into folders."""
    txt_document: Literal["file", "line", "paragraph"] = "file"
    """What one document of a .txt file is: the whole file, a line, or a paragraph (up to an empty line)."""
    dataset: Text | None = None
    """source huggingface: the dataset's name, e.g. `allenai/c4`."""
    name: Text | None = None
    """source huggingface: the dataset's configuration, e.g. `en`."""
    revision: Text | None = None
    """source huggingface: commit or tag of the dataset; the default is its main branch."""
    split: Text = "train"
    """source huggingface: the split to train on."""
    streaming: bool = True
    """source huggingface: read while training (true), or download the whole dataset first (false)."""
    text_column: Text = "text"
    """Column of .jsonl, .parquet and Hub datasets that holds the text."""
    packing: Literal["document", "dense"] = "dense"
    """`document`: one document a row, cut and padded to batch.sequence_length, the loss ignores padding (the
    paper's). `dense`: documents joined by the end-of-text token and cut into full rows."""
    shuffle_block: Count = 8192
    """Streaming only: documents that are read together and shuffled among themselves. A local corpus is shuffled
    as a whole."""
    prefetch: Annotated[int, Field(ge=0)] = 2
    """Streaming only: batches prepared ahead in a background thread; 0: none."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of the documents held out, chosen by a hash of their text, whatever the seed. Default 0.02 where
    neither validation_files nor validation_split is given."""
    validation_files: Strings | None = None
    """source files: globs of the validation text; then nothing is held out of `files`."""
    validation_split: Text | None = None
    """source huggingface: the validation split; then nothing is held out of `split`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        needs: dict[str, tuple[str, ...]] = {
            "files": ("files", "validation_files"),
            "huggingface": ("dataset", "name", "revision", "validation_split"),
        }
        for source, keys in needs.items():
            for key in keys:
                if self.source != source and getattr(self, key) is not None:
                    raise ValueError(
                        f'data.{key} belongs to data.source = "{source}", but the source is "{self.source}"'
                    )
        required = {"files": "files", "huggingface": "dataset"}.get(self.source)
        if required and not getattr(self, required):
            raise ValueError(f'data.source = "{self.source}" needs data.{required}')
        held_out = {
            f"data.{key}": getattr(self, key) for key in ("validation_fraction", "validation_files", "validation_split")
        }
        given = [key for key, value in held_out.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other: give one of them")
        if self.validation_split is not None and self.validation_split == self.split:
            raise ValueError(
                f'data.validation_split is data.split ("{self.split}"): the model would be tested on its training text'
            )
        return self


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
        given = [key for key in ("name", "file", "train_vocab_size") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"tokenizer.{given[0]} and tokenizer.{given[1]} exclude each other: give one of them")
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


class OptimizerSettings(Section):
    """[optimizer] The update rule."""

    name: Literal["adamw", "adam", "muon"] = "adamw"
    """`adamw`: decoupled decay. `adam`: L2 decay, added to the gradient. `muon`: Muon for the 2-D matrices of the
    transformer blocks, AdamW for the rest."""
    lr: Positive = 1e-3
    """Peak learning rate."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of Adam's first and second moment."""
    eps: Positive = 1e-8
    """Adam's epsilon."""
    max_grad_norm: Positive | None = None
    """Clip the gradient to this 2-norm; the default is no clipping, as in the paper."""
    muon_lr: Positive | None = None
    """muon: peak learning rate of the matrices, in units of AdamW's update RMS; default: lr."""
    muon_momentum: Momentum | None = None
    """muon: momentum; default 0.95."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("muon_lr", "muon_momentum"):
            if self.name != "muon" and getattr(self, key) is not None:
                raise ValueError(f'optimizer.{key} belongs to optimizer.name = "muon", but the name is "{self.name}"')
        return self


class ScheduleSettings(Section):
    """[schedule] The learning rate over the steps."""

    steps: Count
    """Optimizer steps of the whole run."""
    name: Literal["cosine", "linear", "wsd"] = "cosine"
    """Shape after the warm-up. `wsd`: constant, then linear decay over the last decay_steps."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up from 0; default: a tenth of steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Final learning rate over peak learning rate."""
    decay_steps: Count | None = None
    """wsd: steps of the final decay; default: a tenth of steps."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        warmup, decay = self.warmup_steps or 0, self.decay_steps or 0
        if self.name != "wsd" and self.decay_steps is not None:
            raise ValueError(f'schedule.decay_steps belongs to schedule.name = "wsd", but the name is "{self.name}"')
        if warmup > self.steps:
            raise ValueError(f"schedule.warmup_steps {warmup} is more than schedule.steps {self.steps}")
        if warmup + decay > self.steps:
            raise ValueError(
                f"schedule.warmup_steps {warmup} + schedule.decay_steps {decay} "
                f"is more than schedule.steps {self.steps}"
            )
        return self


class WeightDecaySettings(Section):
    """[weight_decay] Which decay every parameter gets, and when it changes."""

    policy: Literal["alphadecay", "uniform", "none", "awd", "adadecay", "file"] = "alphadecay"
    """`alphadecay`: per module, from the spectra of the current weights. `uniform`: base everywhere. `none`: 0.
    `awd`: one global value each step (Ghiasi et al. 2023). `adadecay`: per module, from gradient norms (Nakamura and
    Hong 2019). `file`: a wd.json of `esdtool assign`, unchanged during the run."""
    base: NotNegative | None = None
    """Base decay. Default: 0.1 for adamw and muon, 1e-5 for adam, whose L2 decay is on another scale."""
    interval: Count = 500
    """alphadecay: steps between two refreshes of the decays."""
    delay: Annotated[int, Field(ge=0)] = 0
    """alphadecay: steps between the measurement of the weights and the first use of the decays, less than interval; the
    spectra are computed beside the training. 0: within the step, as published."""
    initial: bool = True
    """alphadecay: assign from the initial weights too; false: base until the first refresh."""
    compute: Literal["all-ranks", "first-rank"] = "all-ranks"
    """alphadecay: spread the spectra over the ranks (each module on one of them), or leave them to rank 0."""
    fit: TrainingFitName = DEFAULT_ESTIMATOR
    """Estimator of alpha."""
    score: Literal["alpha", "gradient_norm", "frobenius_norm", "spectral_norm", "stable_rank", "alpha_weighted"] = (
        "alpha"
    )
    """The number that modules are ranked by."""
    assign: Literal["linear", "sqrt", "log2", "sigmoid"] = "linear"
    """From scores to decays; `linear` is the method."""
    granularity: Literal["module", "layer", "role"] = "module"
    """Decay per module (the method), or the same for all modules of a layer or of a role."""
    min_ratio: NotNegative = 0.67
    """linear: decay of the smallest score, over base."""
    max_ratio: NotNegative | None = None
    """linear: decay of the largest score, over base. Default: the published 5 for adamw (and muon), 3 for adam."""
    normalize: bool = False
    """Rescale so that the parameter-weighted mean of the decays is base: a fair comparison with uniform."""
    control: Control = "none"
    """alphadecay, for experiments: what would show that the gain is not the method's. `mean`: each module gets the
    parameter-weighted mean of the method's decays; `shuffled`: the same decays, dealt to the modules at random (by
    run.seed, the same way at each refresh); `reversed`: the same decays in the opposite order."""
    include: Strings = ()
    """Regular expressions on module names: only these are assigned; each must match something."""
    exclude: Strings = ()
    """Regular expressions on module names: these are not assigned; each must match something."""
    unlisted: Literal["keep", "no-decay", "base"] = "keep"
    """Parameters that get no decay of their own (norms, embeddings, lm_head, excluded modules): `keep` what the
    optimizer starts with, which in training is base (as in the paper's code); `base` says the same outright;
    `no-decay`: 0."""
    path: Text | None = None
    """file: the wd.json."""
    fast: bool = False
    """Allow float32 spectra where their error bound admits it."""
    k_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """hill: fraction of the eigenvalues in the tail."""
    min_eigs: Annotated[int, Field(ge=2)] = 50
    """Modules with fewer eigenvalues are not scored."""
    farms_rows: Annotated[int, Field(ge=2)] = 100
    """farms: rows of a window."""
    farms_ratio: Annotated[float, Field(ge=1)] = 2.0
    """farms: columns over rows of a window."""
    farms_windows: Count = 10
    """farms: windows per dimension."""
    awd_scale: Positive = 100.0
    """awd: the method's own coefficient is this times base (100 in the paper's comparison)."""
    awd_smoothing: Annotated[float, Field(gt=0, le=1)] = 0.9
    """awd: weight of the newest value in the running mean."""
    adadecay_rule: Literal["module", "parameter"] = "module"
    """adadecay: scores of whole modules (the paper's comparison), or the original rule for every single weight."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.policy == "file" and self.path is None:
            raise ValueError('weight_decay.policy = "file" needs weight_decay.path')
        if self.policy != "file" and self.path is not None:
            raise ValueError(
                f'weight_decay.path belongs to weight_decay.policy = "file", but the policy is "{self.policy}"'
            )
        if self.delay and self.policy != "alphadecay":
            raise ValueError(
                f'weight_decay.delay belongs to weight_decay.policy = "alphadecay", but the policy is "{self.policy}"'
            )
        if self.delay >= self.interval and self.delay:
            raise ValueError(f"weight_decay.delay {self.delay} is not less than weight_decay.interval {self.interval}")
        if self.max_ratio is not None and self.min_ratio > self.max_ratio:
            raise ValueError(
                f"weight_decay.min_ratio {self.min_ratio} is more than weight_decay.max_ratio {self.max_ratio}"
            )
        return self

    def score_options(self) -> ScoreOptions:
        """The same settings as `esdtool.analysis.document` functions take them."""
        return ScoreOptions(
            fit=(self.fit,),
            k_fraction=self.k_fraction,
            min_eigs=self.min_eigs,
            fast=self.fast,
            farms_rows=self.farms_rows,
            farms_ratio=self.farms_ratio,
            farms_windows=self.farms_windows,
        )


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
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initial weights and data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if there is one."""
    distributed: Literal["ddp", "fsdp2"] = "ddp"
    """With several ranks: whole model on each (ddp), or sharded (fsdp2)."""
    compile: bool = False
    """Compile the model with torch.compile."""
    threads: Count | None = None
    """CPU threads of one rank; default: torch's own choice."""


def _exactly_one(section: str, **alternatives: object) -> None:
    given = [key for key, value in alternatives.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{section}.{given[0]} and {section}.{given[1]} exclude each other: give one of them")
    if not given:
        *first, last = (f"{section}.{key}" for key in alternatives)
        raise ValueError(f"one of {', '.join(first)} and {last} is needed")
