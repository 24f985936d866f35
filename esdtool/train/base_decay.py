"""The base decay of a run: given, the optimizer's default, or predicted for its model."""

from __future__ import annotations

from torch import nn

from esdtool.train.config.train_config import TrainConfig
from esdtool.train.power_lines import PowerLines


def base_decay(config: TrainConfig, model: nn.Module) -> float:
    """Return the base decay of [weight_decay].

    Raises:
        ConfigError: if it is to be predicted and the law does not speak of such a run.
    """
    given = config.base_decay
    return power_lines(config, model).base if given is None else given


def power_lines(config: TrainConfig, model: nn.Module) -> PowerLines:
    """Return the law for a run.

    Raises:
        ConfigError: if it does not speak of such a run.
    """
    return PowerLines(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=config.tokens_per_step * config.schedule.steps,
        batch_tokens=config.tokens_per_step,
        lr=config.optimizer.lr,
    )


def explanation(config: TrainConfig, model: nn.Module) -> str | None:
    """Say how a predicted base decay comes about; None where it is given."""
    return power_lines(config, model).explanation if config.base_decay is None else None
