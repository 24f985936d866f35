"""Use AlphaDecay, layer-wise learning rates and SpectralMonitor in Lightning (`lightning` or `pytorch_lightning`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from esdtool.errors import AssignmentError
from esdtool.optim import AlphaDecay, LayerwiseLR, SpectralMonitor
from esdtool.optim.scalars import LEVELS, PREFIX, Level
from esdtool.optim.schedule import SpectralSchedule

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback


class ScheduleCallback(Callback):
    """Step a live schedule before every optimizer step and keep its state in the checkpoints of Lightning.

    At each refresh alphas and values go to the Trainer's loggers.

    Args:
        log: what is logged: any of `mean`, `role`, `layer`, `module`.
        options: options of the schedule. Give none if the module has the schedule as an attribute.
    """

    kind: ClassVar[type[SpectralSchedule]]
    """What schedule it is."""
    attribute: ClassVar[str]
    """Where a module keeps a schedule that it has built itself."""

    def __init__(self, *, log: Sequence[Level] = LEVELS, **options: Any) -> None:
        self.log_levels = tuple(log)
        self.options = options
        self.schedule: Any = None
        """The schedule; None before `fit` starts."""
        self._saved: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find or build the schedule. The optimizers exist, but their state has not been restored yet."""
        own = getattr(pl_module, self.attribute, None)
        if isinstance(own, self.kind):
            if self.options:
                raise AssignmentError(f"the module has its own {self.attribute}: give {type(self).__name__} no options")
            self.schedule = own
            return
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined,unused-ignore]
        others = (each.schedule for each in callbacks if isinstance(each, ScheduleCallback) and each is not self)
        share = next((other for other in others if other is not None), None)
        self.schedule = self.kind(pl_module, trainer.optimizers, **{"share": share, **self._complete(trainer)})

    def _complete(self, trainer: Trainer) -> dict[str, Any]:
        """Return the options of the schedule, those included that only the Trainer knows."""
        del trainer
        return self.options

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the values of the schedule, because a resume has restored old ones in the optimizers."""
        assert self.schedule is not None
        if self._saved is not None:
            self.schedule.load_state_dict(self._saved)
            self._saved = None
        else:
            self.schedule.apply()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Step the schedule once per update, also with several optimizers."""
        assert self.schedule is not None
        if optimizer is trainer.optimizers[0]:
            self.schedule.step()
            if self.schedule.last_refresh == self.schedule.update_step:
                _log(trainer, self.schedule.scalars(self.log_levels), self.schedule.update_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint. Lightning calls this on every rank."""
        if self.schedule is None:
            return {}
        self.schedule.settle()
        return cast(dict[str, Any], self.schedule.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts, because Lightning calls this before there are optimizers."""
        self._saved = state_dict or None


class AlphaDecayCallback(ScheduleCallback):
    """Step AlphaDecay before every optimizer step and keep its state in the checkpoints of Lightning.

    If you use a learning-rate scheduler, build the schedule in `configure_optimizers` before it, because the scheduler
    counts parameter groups:

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
            self.alpha_decay = AlphaDecay(self, optimizer, weight_decay=0.1, interval=500)
            return [optimizer], [CosineAnnealingLR(optimizer, 1000)]

        trainer = Trainer(callbacks=[AlphaDecayCallback()])

    Without a scheduler, `AlphaDecayCallback(weight_decay=0.1, interval=500)` is enough.

    Args:
        log: what is logged at each refresh: any of `mean`, `role`, `layer`, `module`.
        options: options of `esdtool.AlphaDecay`. Give none if the module has an attribute `alpha_decay`.
    """

    kind = AlphaDecay
    attribute = "alpha_decay"


class LayerwiseLRCallback(ScheduleCallback):
    """Step LayerwiseLR before every optimizer step and keep its state in the checkpoints of Lightning.

    As with `AlphaDecayCallback`, build the schedule in `configure_optimizers`, as `self.layerwise_lr`, if there is a
    learning-rate scheduler (with `share=self.alpha_decay` if there is one); `self.trainer.estimated_stepping_batches`
    is its `num_updates`. Without a scheduler, `LayerwiseLRCallback(interval=100)` is enough.

    Args:
        log: what is logged at each refresh: any of `mean`, `role`, `layer`, `module`.
        options: options of `esdtool.LayerwiseLR`. By default `num_updates` is the Trainer's. Give none if the module
            has an attribute `layerwise_lr`.
    """

    kind = LayerwiseLR
    attribute = "layerwise_lr"

    def _complete(self, trainer: Trainer) -> dict[str, Any]:
        known = trainer.estimated_stepping_batches
        return {"num_updates": int(known) if math.isfinite(known) else None, **self.options}


class SpectralMonitorCallback(Callback):
    """Measure the spectra of the weights while Lightning trains, and give the numbers to the Trainer's loggers.

        trainer = Trainer(callbacks=[SpectralMonitorCallback(every=500)], logger=TensorBoardLogger("logs"))

    Beside a schedule's callback, which stands before it in the list, both share their spectra.

    Args:
        options: options of `esdtool.SpectralMonitor`.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.monitor: SpectralMonitor | None = None
        """The monitor; None before `fit` starts."""
        self._saved: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the monitor, or go on with a saved one."""
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined,unused-ignore]
        schedules = (each.schedule for each in callbacks if isinstance(each, ScheduleCallback))
        share = next((schedule for schedule in schedules if schedule is not None), None)
        self.monitor = SpectralMonitor(pl_module, **{"share": share, **self.options})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on counting where a checkpoint stopped."""
        if self._saved is not None and self.monitor is not None:
            self.monitor.load_state_dict(self._saved)
            self._saved = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Step the monitor once per update, also with several optimizers."""
        assert self.monitor is not None
        if optimizer is trainer.optimizers[0]:
            found = self.monitor.step()
            if found is not None:
                _log(trainer, found, self.monitor.update_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the monitor's own writers."""
        if self.monitor is not None:
            self.monitor.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        return {} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._saved = state_dict or None


def _log(trainer: Trainer, scalars: Mapping[str, float], step: int) -> None:
    """Give scalars to all loggers, whatever the Trainer's `log_every_n_steps` is."""
    for logger in trainer.loggers:
        if scalars:
            logger.log_metrics({f"{PREFIX}{name}": value for name, value in scalars.items()}, step=step)
