"""`awd`: adaptive weight decay (Ghiasi et al. 2023, arXiv 2210.00094)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from esdtool.train.config.section import Count, Positive
from esdtool.train.parameter_groups import trainable
from esdtool.train.policy import DecayRecord, PolicySettings, Target


class AwdSettings(PolicySettings):
    """One global value each step, from the norms of gradient and weights (Ghiasi et al. 2023)."""

    policy: Literal["awd"]
    """`awd`: one global value each step (Ghiasi et al. 2023)."""
    interval: Count = 500
    """Steps between two lines of decay.jsonl; the decay itself is new each step."""
    awd_scale: Positive = 100.0
    """The method's own coefficient is this times base (100 in the paper's comparison)."""
    awd_smoothing: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Weight of the newest value in the running mean."""

    def start(self, target: Target) -> AdaptiveWeightDecay:
        """Start the policy on a model and its optimizers."""
        return AdaptiveWeightDecay(self, target)


class AdaptiveWeightDecay:
    """Adaptive weight decay (Ghiasi et al. 2023, arXiv 2210.00094): one global value, from gradient and weights.

    lambda_t = c ||grad||_2 / ||w||_2 over all parameters, c = awd_scale * base; used is the running
    mean bar_t = (1 - s) bar_{t-1} + s lambda_t with bar_0 = 0 and s = awd_smoothing.
    """

    def __init__(self, settings: AwdSettings, target: Target) -> None:
        self._target = target
        self._interval = settings.interval
        self._coefficient = settings.awd_scale * target.base_decay
        self._smoothing = settings.awd_smoothing
        self._mean = 0.0
        self._count = 0

    def step(self, grad_norm: float) -> DecayRecord | None:
        """Set the decays of the next update."""
        from esdtool.train.norms import total_norm  # and with it torch, which reading a configuration does not need

        parameters = trainable(self._target.model).values()
        value = self._coefficient * grad_norm / total_norm(list(parameters))
        self._mean = (1 - self._smoothing) * self._mean + self._smoothing * value
        self._count += 1
        self._apply()
        is_due = self._count % self._interval == 0
        return DecayRecord(seconds=0.0, modules=self._target.current_decays()) if is_due else None

    def _apply(self) -> None:
        for group in self._target.decaying():
            group["weight_decay"] = self._mean

    def initial(self) -> DecayRecord | None:
        """Return the record of the initial decays, if there is one."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"mean": self._mean, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self._mean, self._count = float(state["mean"]), int(state["count"])
        self._apply()


POLICY = AwdSettings
