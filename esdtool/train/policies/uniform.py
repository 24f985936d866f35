"""`uniform`: the base decay everywhere, for the whole run."""

from __future__ import annotations

from typing import Any, Literal

from esdtool.train.policy import DecayRecord, PolicySettings, Target


class UniformSettings(PolicySettings):
    """The base decay everywhere."""

    policy: Literal["uniform"]
    """`uniform`: base everywhere."""

    def start(self, target: Target) -> ConstantDecay:
        """Start the policy on a model and its optimizers."""
        return ConstantDecay(target, target.base_decay)


class ConstantDecay:
    """One value everywhere, for the whole run."""

    def __init__(self, target: Target, value: float) -> None:
        self._target, self._value = target, value
        self._apply()

    def _apply(self) -> None:
        for group in self._target.decaying():
            group["weight_decay"] = self._value

    def step(self, grad_norm: float) -> DecayRecord | None:
        """Set the decays of the next update."""
        del grad_norm
        return None

    def initial(self) -> DecayRecord | None:
        """Return the record of the initial decays, if there is one."""
        return DecayRecord(seconds=0.0, modules=self._target.current_decays())

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        del state  # the value is the configuration's
        self._apply()


POLICY = UniformSettings
