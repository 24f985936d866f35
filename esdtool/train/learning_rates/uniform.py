"""`uniform`: the learning rate of [schedule] everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from esdtool.train.learning_rate import LearningRateSettings
from esdtool.train.policy import Target

if TYPE_CHECKING:
    from esdtool.optim.schedule import SpectralSchedule


class UniformSettings(LearningRateSettings):
    """The learning rate of [schedule] everywhere."""

    policy: Literal["uniform"] = "uniform"
    """`uniform`: the learning rate of [schedule] everywhere."""

    def start(self, target: Target, share: SpectralSchedule | None) -> None:
        """Multiply nothing."""


POLICY = UniformSettings
