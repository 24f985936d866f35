"""Define learning-rate policies: their settings, their decisions, and the records of these.

The policies themselves are in `esdtool.train.learning_rates`, one file each. torch is imported where it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from esdtool.train.config.section import Section
from esdtool.train.policy import Target

if TYPE_CHECKING:
    from esdtool.optim.schedule import SpectralSchedule


class LearningRateSettings(Section, ABC):
    """Keys of [learning_rate] that every policy has."""

    policy: str
    """What multiplies the learning rate of [schedule], parameter by parameter."""

    @abstractmethod
    def start(self, target: Target, share: SpectralSchedule | None) -> LearningRates | None:
        """Start the policy on a model, or return None where nothing is multiplied.

        Args:
            target: the model and its optimizers, whose groups may still be split.
            share: a schedule whose spectra serve this policy too, where both look at the same weights.

        Raises:
            ConfigError, AssignmentError, UsageError: if the settings do not fit the model.
        """

    def rehearse(self, target: Target) -> None:
        """Refuse what `start` would refuse, for a model whose parameters hold no numbers (torch's meta device).

        Raises:
            ConfigError, AssignmentError, UsageError: if the settings do not fit the model.
        """


@dataclass(frozen=True, kw_only=True)
class ModuleRate:
    """The entry of one module in learning_rate.jsonl."""

    ratio: float
    """Learning rate over that of [schedule]; where ratios glide, the one that they glide to."""
    alpha: float | None = None
    """None where the policy does not look at spectra, or the module has none or could not be scored."""
    score: float | None = None
    """What the ratio follows, where that is not alpha."""


@dataclass(frozen=True, kw_only=True)
class RateRecord:
    """One line of learning_rate.jsonl."""

    seconds: float
    """Time that the training waited for the spectra on this rank."""
    weights_step: int | None = None
    """Updates that the measured weights had seen; None if no weights were measured."""
    modules: Mapping[str, ModuleRate] = field(default_factory=dict)
    """By module name."""
    remark: str | None = None
    """What the user should know of it, e.g. that modules could not be scored."""


class LearningRates(Protocol):
    """Multiplies the learning rates of a run. The same decisions on every rank."""

    def step(self) -> RateRecord | None:
        """Set the ratios of an update, before the optimizer step. Returns what to log, or None."""

    def initial(self) -> RateRecord | None:
        """Return the record to log before the first step."""

    def mean_ratio(self) -> float:
        """Return the mean ratio in force over all trained parameters, each element counting once."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
