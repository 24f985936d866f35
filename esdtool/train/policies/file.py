"""`file`: a wd.json of `esdtool assign`, applied at the start and unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from esdtool.errors import ConfigError
from esdtool.names import module_name
from esdtool.train.config.section import Text
from esdtool.train.policy import DecayRecord, ModuleDecay, PolicySettings, Target


class FileSettings(PolicySettings):
    """A wd.json of `esdtool assign`, unchanged during the run."""

    policy: Literal["file"]
    """`file`: a wd.json of `esdtool assign`, unchanged during the run."""
    path: Text
    """The wd.json."""

    def start(self, target: Target) -> FixedAssignment:
        """Start the policy on a model and its optimizers."""
        return FixedAssignment(self, target)

    def rehearse(self, target: Target) -> None:
        """Apply the file, which needs no weights, and so refuse one that does not fit."""
        self.start(target)


class FixedAssignment:
    """`file`: a wd.json, applied at the start and unchanged."""

    def __init__(self, settings: FileSettings, target: Target) -> None:
        """Read the file and apply it.

        Raises:
            AssignmentError: if it is invalid or does not fit the model.
            ConfigError: if it was made for the other kind of decay.
        """
        from esdtool.assignment.reading import load_assignment, naming

        self._target = target
        self._assignment = load_assignment(Path(settings.path))
        kind = "l2" if target.optimizer == "adam" else "decoupled"
        if self._assignment.optimizer != kind:
            raise ConfigError(
                f'weight_decay.path {settings.path}: its decays are for "{self._assignment.optimizer}" weight decay, '
                f'but optimizer.name "{target.optimizer_name}" decays "{kind}"; '
                "make another with `esdtool assign --optimizer`"
            )
        with naming(settings.path):
            self._apply()

    def _apply(self) -> None:
        from esdtool.optim import apply

        target = self._target
        apply(list(target.optimizers), self._assignment, target.model, unlisted=target.unlisted)

    def step(self, grad_norm: float) -> DecayRecord | None:
        """Set the decays of the next update."""
        del grad_norm
        return None

    def initial(self) -> DecayRecord | None:
        """Return the record of the initial decays, if there is one."""
        entries: Mapping[str, Any] = self._assignment.parameters
        return DecayRecord(
            seconds=0.0,
            modules={
                module_name(name): ModuleDecay(weight_decay=entry.weight_decay, alpha=entry.alpha, score=entry.score)
                for name, entry in entries.items()
            },
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        del state
        self._apply()


POLICY = FileSettings
