"""The whole of a training run: its sections together, and the defaults that depend on several keys."""

from __future__ import annotations

from typing import Any, Final, Self

from pydantic import Field, model_validator

from esdtool.train.config.section import Section
from esdtool.train.config.sections import (
    AdamWSettings,
    BatchSettings,
    CheckpointSettings,
    DataSettings,
    EvalSettings,
    FilesData,
    HubData,
    LoggingSettings,
    ModelSettings,
    MuonSettings,
    OptimizerSettings,
    PrecisionSettings,
    RunSettings,
    ScheduleSettings,
    StdlibData,
    TokenizerSettings,
    WsdSchedule,
)
from esdtool.train.learning_rates import DEFAULT as UNIFORM
from esdtool.train.learning_rates import LearningRatePolicySettings, load_learning_rates
from esdtool.train.policies import DEFAULT, WeightDecaySettings, load_policies
from esdtool.train.policy import kind_of_decay

DEFAULT_FRACTION: Final = 0.02
"""Fraction of the documents that are held out by default."""

_IMMATERIAL: Final = frozenset({"run.dir", "run.device", "run.threads", "run.distributed", "run.compile"})
_IMMATERIAL_SECTIONS: Final = frozenset({"logging", "checkpoint"})


def is_immaterial(key: str) -> bool:
    """Return whether runs that differ in nothing but `section.key` are the same experiment.

    >>> is_immaterial("logging.every"), is_immaterial("run.threads"), is_immaterial("run.seed")
    (True, True, False)
    """
    return key in _IMMATERIAL or key.partition(".")[0] in _IMMATERIAL_SECTIONS


class TrainConfig(Section):
    """The whole of a training run."""

    model: ModelSettings
    data: DataSettings = StdlibData()
    """[data] The text, how it becomes rows, and what is held out for validation."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = AdamWSettings()
    """[optimizer] The update rule."""
    schedule: ScheduleSettings
    """[schedule] The learning rate over the steps."""
    learning_rate: LearningRatePolicySettings = Field(
        default_factory=lambda: load_learning_rates()[UNIFORM].model_validate({})
    )
    """[learning_rate] Multiples of the learning rate of [schedule], module by module."""
    weight_decay: WeightDecaySettings = Field(default_factory=lambda: load_policies()[DEFAULT].model_validate({}))
    """[weight_decay] Which decay every parameter gets, and when it changes."""
    precision: PrecisionSettings = PrecisionSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    logging: LoggingSettings = LoggingSettings()
    run: RunSettings = RunSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        tokenizer = self.tokenizer
        if (tokenizer.name, tokenizer.file, tokenizer.train_vocab_size) == (None, None, None) and not self.model.from_:
            raise ValueError("one of tokenizer.name, tokenizer.file and tokenizer.train_vocab_size is needed")
        self.weight_decay.check(self.optimizer.name)
        return self

    @property
    def base_decay(self) -> float | None:
        """weight_decay.base, or the optimizer's default; None where it is predicted for the model."""
        given = self.weight_decay.base
        if given == "power-lines":
            return None
        return self.weight_decay.published_bases[kind_of_decay(self.optimizer.name)] if given is None else given

    @property
    def data_seed(self) -> int:
        """The seed of the data order: data.seed, or run.seed."""
        return self.run.seed if self.data.seed is None else self.data.seed

    @property
    def warmup_steps(self) -> int:
        """schedule.warmup_steps, or a tenth of the steps."""
        given = self.schedule.warmup_steps
        return self.schedule.steps // 10 if given is None else given

    @property
    def decay_steps(self) -> int:
        """schedule.decay_steps, or a tenth of the steps (at least 1) for wsd; 0 for other schedules."""
        if not isinstance(self.schedule, WsdSchedule):
            return 0
        return self.schedule.decay_steps or max(1, self.schedule.steps // 10)

    @property
    def validation_fraction(self) -> float | None:
        """data.validation_fraction, or its default; None where the validation text is of its own."""
        data = self.data
        if (isinstance(data, FilesData) and data.validation_files is not None) or (
            isinstance(data, HubData) and data.validation_split is not None
        ):
            return None
        return DEFAULT_FRACTION if data.validation_fraction is None else data.validation_fraction

    @property
    def run_dir(self) -> str:
        """run.dir, or `runs/run` for a config that came from no file."""
        return self.run.dir or "runs/run"

    @property
    def eval_micro_size(self) -> int:
        """eval.micro_size, or batch.micro_size."""
        return self.eval.micro_size or self.batch.micro_size

    @property
    def tokens_per_step(self) -> int:
        """Positions of one global batch, padding included."""
        return self.batch.global_size * self.batch.sequence_length

    def flat(self) -> dict[str, Any]:
        """Return every key as `section.key`, its value as JSON has it."""
        document = self.model_dump(by_alias=True, mode="json")
        return {f"{section}.{key}": value for section, values in document.items() for key, value in values.items()}

    def resolved(self) -> TrainConfig:
        """Return the same run with every default that depends on another key written out."""
        updates: dict[str, dict[str, Any]] = {
            "schedule": {"warmup_steps": self.warmup_steps},
            "weight_decay": self.weight_decay.defaults(kind_of_decay(self.optimizer.name)),
            "eval": {"micro_size": self.eval_micro_size},
            "run": {"dir": self.run_dir},
        }
        if isinstance(self.schedule, WsdSchedule):
            updates["schedule"]["decay_steps"] = self.decay_steps
        if isinstance(self.optimizer, MuonSettings):
            updates["optimizer"] = {"muon_lr": self.optimizer.muon_lr or self.optimizer.lr}
        if self.validation_fraction is not None:
            updates["data"] = {"validation_fraction": self.validation_fraction}
        document = self.model_dump(by_alias=True)
        for section, values in updates.items():
            document[section].update(values)
        return TrainConfig.model_validate(document)
