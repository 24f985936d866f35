"""`file`: the learning rates of an assignment file, unchanged during the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from esdtool.names import canonical_name, module_name
from esdtool.train.config.section import Text
from esdtool.train.learning_rate import LearningRateSettings, ModuleRate, RateRecord
from esdtool.train.parameter_groups import trainable
from esdtool.train.policy import Target

if TYPE_CHECKING:
    from esdtool.optim.schedule import SpectralSchedule


class FileSettings(LearningRateSettings):
    """The learning rates of `esdtool assign --for learning-rate`, unchanged during the run."""

    policy: Literal["file"]
    """`file`: those of `esdtool assign --for learning-rate`, unchanged during the run."""
    path: Text
    """The assignment file, of version 2."""

    def start(self, target: Target, share: SpectralSchedule | None) -> FileRates:
        """Start the policy on a model and its optimizers."""
        del share
        return FileRates(self, target)

    def rehearse(self, target: Target) -> None:
        """Apply the file, which needs no weights, and so refuse one that does not fit."""
        self.start(target, None)


class FileRates:
    """`file`: the ratios of a file, multiplied into the schedule."""

    def __init__(self, settings: FileSettings, target: Target) -> None:
        """Read the file and apply it.

        Raises:
            AssignmentError: if it is invalid, holds no learning rates or does not fit the model.
        """
        from esdtool.optim.file_rates import scale_by_file

        found = scale_by_file(target.model, tuple(target.optimizers), settings.path)
        self._ratios = {canonical_name(name): ratio for name, ratio in found.items()}
        self._sizes = {name: parameter.numel() for name, parameter in trainable(target.model).items()}

    def step(self) -> RateRecord | None:
        """Keep the ratios."""
        return None

    def initial(self) -> RateRecord | None:
        """Return the record of the ratios."""
        modules = {module_name(name): ModuleRate(ratio=ratio) for name, ratio in self._ratios.items()}
        return RateRecord(seconds=0.0, modules=modules)

    def mean_ratio(self) -> float:
        """Return the mean ratio over all trained parameters."""
        total = sum(self._ratios.get(name, 1.0) * size for name, size in self._sizes.items())
        return total / sum(self._sizes.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps: the file has it all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing."""
        del state


POLICY = FileSettings
