"""The whole of a training run: its sections together, and the defaults that depend on several keys."""

from __future__ import annotations

from typing import Any, Final, Self

from pydantic import model_validator

from esdtool.assignment.rule import PUBLISHED_RATIOS
from esdtool.train.config.sections import (
    BatchSettings,
    CheckpointSettings,
    DataSettings,
    EvalSettings,
    LoggingSettings,
    ModelSettings,
    OptimizerSettings,
    PrecisionSettings,
    RunSettings,
    ScheduleSettings,
    Section,
    TokenizerSettings,
    WeightDecaySettings,
)

_IMMATERIAL: Final = frozenset({"run.dir", "run.device", "run.threads", "run.distributed", "run.compile"})
_IMMATERIAL_SECTIONS: Final = frozenset({"logging", "checkpoint"})


def is_immaterial(key: str) -> bool:
    """Whether runs that differ in nothing but `section.key` are the same experiment.

    >>> is_immaterial("logging.every"), is_immaterial("run.threads"), is_immaterial("run.seed")
    (True, True, False)
    """
    return key in _IMMATERIAL or key.partition(".")[0] in _IMMATERIAL_SECTIONS


class TrainConfig(Section):
    """The whole of a training run."""

    model: ModelSettings
    data: DataSettings = DataSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings
    weight_decay: WeightDecaySettings = WeightDecaySettings()
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
        if self.weight_decay.max_ratio is None and self.weight_decay.min_ratio > self.ratio_range[1]:
            raise ValueError(
                f"weight_decay.min_ratio {self.weight_decay.min_ratio} is more than weight_decay.max_ratio, "
                f"{self.ratio_range[1]} for {self.optimizer.name} by default"
            )
        return self

    @property
    def base_decay(self) -> float:
        """weight_decay.base, or the optimizer's default."""
        if self.weight_decay.base is not None:
            return self.weight_decay.base
        return 1e-5 if self.optimizer.name == "adam" else 0.1

    @property
    def ratio_range(self) -> tuple[float, float]:
        """(min_ratio, max_ratio), the published maximum where none is given."""
        _, published = PUBLISHED_RATIOS["adam" if self.optimizer.name == "adam" else "adamw"]
        maximum = self.weight_decay.max_ratio
        return self.weight_decay.min_ratio, published if maximum is None else maximum

    @property
    def warmup_steps(self) -> int:
        """schedule.warmup_steps, or a tenth of the steps."""
        given = self.schedule.warmup_steps
        return self.schedule.steps // 10 if given is None else given

    @property
    def decay_steps(self) -> int:
        """schedule.decay_steps, or a tenth of the steps (at least 1) for wsd; 0 for other schedules."""
        if self.schedule.name != "wsd":
            return 0
        return self.schedule.decay_steps or max(1, self.schedule.steps // 10)

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
        """Every key as `section.key`, its value as JSON has it."""
        document = self.model_dump(by_alias=True, mode="json")
        return {f"{section}.{key}": value for section, values in document.items() for key, value in values.items()}

    def resolved(self) -> TrainConfig:
        """The same run with every default that depends on another key written out."""
        muon = self.optimizer.name == "muon"
        held_out = (self.data.validation_fraction, self.data.validation_files, self.data.validation_split)
        updates: dict[str, dict[str, Any]] = {
            "data": {"validation_fraction": 0.02} if held_out == (None, None, None) else {},
            "optimizer": {
                "muon_lr": self.optimizer.muon_lr or self.optimizer.lr,
                "muon_momentum": 0.95 if self.optimizer.muon_momentum is None else self.optimizer.muon_momentum,
            }
            if muon
            else {},
            "schedule": {"warmup_steps": self.warmup_steps, "decay_steps": self.decay_steps or None},
            "weight_decay": {"base": self.base_decay, "max_ratio": self.ratio_range[1]},
            "eval": {"micro_size": self.eval_micro_size},
            "run": {"dir": self.run_dir},
        }
        document = self.model_dump(by_alias=True)
        for section, values in updates.items():
            document[section].update(values)
        return TrainConfig.model_validate(document)
