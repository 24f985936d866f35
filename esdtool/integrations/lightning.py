"""Use AlphaDecay in Lightning (`lightning` or `pytorch_lightning`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esdtool.errors import AssignmentError
from esdtool.optim import AlphaDecay

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback


class AlphaDecayCallback(Callback):
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
        options: options of `esdtool.AlphaDecay`. Give none if the module has an attribute `alpha_decay`.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.schedule: AlphaDecay | None = None
        """The schedule; None before `fit` starts."""
        self._saved: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find or build the schedule. The optimizers exist, but their state has not been restored yet."""
        own = getattr(pl_module, "alpha_decay", None)
        if isinstance(own, AlphaDecay):
            if self.options:
                raise AssignmentError("the module has its own alpha_decay: give AlphaDecayCallback no options")
            self.schedule = own
        else:
            self.schedule = AlphaDecay(pl_module, trainer.optimizers, **self.options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the decays of the schedule, because a resume has restored old ones in the optimizers."""
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

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint. Lightning calls this on every rank."""
        if self.schedule is None:
            return {}
        self.schedule.settle()
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts, because Lightning calls this before there are optimizers."""
        self._saved = state_dict or None
