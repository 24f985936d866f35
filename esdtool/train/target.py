"""Build what a policy works on from a configuration and its model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from esdtool.modules import WeightModule
from esdtool.train.base_decay import base_decay
from esdtool.train.config.train_config import TrainConfig
from esdtool.train.policy import Target


def make_target(
    config: TrainConfig,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    modules: Sequence[WeightModule],
    *,
    resuming: bool = False,
) -> Target:
    """Put together what the policy of [weight_decay] needs to know; arguments are the attributes of `Target`."""
    return Target(
        model=model,
        optimizers=optimizers,
        modules=modules,
        base_decay=base_decay(config, model),
        optimizer_name=config.optimizer.name,
        steps=config.schedule.steps,
        seed=config.run.seed,
        unlisted=config.weight_decay.unlisted,
        resuming=resuming,
    )
