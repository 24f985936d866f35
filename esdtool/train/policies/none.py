"""`none`: no weight decay."""

from __future__ import annotations

from typing import Literal

from esdtool.train.policies.uniform import ConstantDecay
from esdtool.train.policy import PolicySettings, Target


class NoDecaySettings(PolicySettings):
    """No weight decay, whatever base says."""

    policy: Literal["none"]
    """`none`: 0 everywhere."""

    def start(self, target: Target) -> ConstantDecay:
        """Start the policy on a model and its optimizers."""
        return ConstantDecay(target, 0.0)


POLICY = NoDecaySettings
