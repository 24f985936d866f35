"""Use AlphaDecay, layer-wise learning rates, wd.json and SpectralMonitor in the Hugging Face Trainer.

The Trainer builds its learning-rate scheduler right after the optimizer, and the scheduler counts parameter groups, so
the groups must be split before. `use_alpha_decay`, `use_layerwise_lr` and `use_assignment` therefore hook
`create_optimizer`. The callbacks do the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from esdtool.errors import AssignmentError
from esdtool.optim import AlphaDecay, LayerwiseLR, SpectralMonitor, apply, load_assignment
from esdtool.optim.scalars import LEVELS, Level
from esdtool.optim.schedule import SpectralSchedule

if TYPE_CHECKING:
    from transformers import Trainer

    from esdtool.assignment.document import Assignment


Log = Callable[[dict[str, float]], None]
"""The part of `Trainer.log` that is used here."""

CallbackT = TypeVar("CallbackT", bound="ScheduleCallback")


class ScheduleCallback(TrainerCallback, ExportableState):
    """Step a live schedule and keep its state in the Trainer's checkpoints."""

    kind: ClassVar[type[SpectralSchedule]]
    """What schedule it is."""

    def __init__(self, *, log: Sequence[Level] = LEVELS, **options: Any) -> None:
        self.log_levels = tuple(log)
        self.log: Log | None = None
        """The Trainer's `log`, which reaches every reporter."""
        self.options = options
        self.schedule: Any = None
        """The schedule; None until the Trainer has built its optimizer."""
        self._optimizer: Any = None
        self._held: list[torch.Tensor] = []

    def attach(self, model: torch.nn.Module, optimizer: Any, others: Sequence[ScheduleCallback] = ()) -> None:
        """Build the schedule on an optimizer, or restart it if it has this optimizer already.

        The Trainer keeps its optimizer for a second `train()` and for another attempt with a smaller batch. A second
        schedule would take the current values for the base.

        Args:
            model: the Trainer's model.
            optimizer: the Trainer's optimizer.
            others: callbacks whose schedule, if there is one, shares its spectra with this one.
        """
        if self.schedule is None or optimizer is not self._optimizer:
            share = next((other.schedule for other in others if other.schedule is not None), None)
            self.schedule = self.kind(model, optimizer, **{"share": share, **self._complete()})
            self._optimizer, self._held = optimizer, _parameters(optimizer)
        elif self.schedule.update_step > 0:
            self.schedule.restart()

    def _complete(self) -> dict[str, Any]:
        """Return the options of the schedule, those included that only the Trainer knows."""
        return self.options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the schedule after a resume, because the Trainer has restored old values in the optimizer."""
        self._follow(kwargs["model"], _inner(kwargs["optimizer"]))
        schedule = self._schedule()
        # The Trainer declares a list of callbacks here and keeps a mapping of their states.
        states: Any = state.stateful_callbacks or {}
        saved = states.get(type(self).__name__)
        if state.global_step > 0 and isinstance(saved, dict) and saved["attributes"].get("saved") is not None:
            schedule.load_state_dict(saved["attributes"]["saved"])
        else:
            schedule.apply()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the schedule after clipping and before the update."""
        self._schedule().step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log new alphas and values, and finish a refresh in progress before a checkpoint, which one rank writes."""
        schedule = self._schedule()
        if self.log is not None and self.log_levels and schedule.last_refresh == schedule.update_step:
            self.log(schedule.scalars(self.log_levels))
        self.on_epoch_end(args, state, control, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish a refresh in progress before a checkpoint, which only one rank writes."""
        if control.should_save:
            self._schedule().settle()

    def state(self) -> dict[str, Any]:
        """Return the state for trainer_state.json, without the options, which JSON may be unable to represent."""
        saved = None if self.schedule is None else self.schedule.state_dict()
        return {"args": {}, "attributes": {"saved": saved}}

    def _follow(self, model: torch.nn.Module, optimizer: Any) -> None:
        """Move the schedule to the current parameters of the optimizer: FSDP2 shards after the optimizer is built.

        Raises:
            AssignmentError: if the optimizer's parameters are no longer the model's.
        """
        held, schedule = _parameters(optimizer), self._schedule()
        if len(held) == len(self._held) and all(now is then for now, then in zip(held, self._held, strict=True)):
            return
        schedule.settle()
        state = schedule.state_dict()
        schedule.close()
        try:
            moved = self.kind(model, optimizer, **{"share": schedule, **self._complete(), "initial": False})
        except AssignmentError as error:
            raise AssignmentError(
                f"the Trainer replaced the optimizer's parameters by others that {self.kind.name} cannot follow: "
                f"{error}; use a static wd.json here, with use_assignment"
            ) from error
        moved.load_state_dict(state)
        self.schedule, self._held = moved, held

    def _schedule(self) -> Any:
        if self.schedule is None:
            raise AssignmentError(
                f"{type(self).__name__} was not attached: use the functions of esdtool.integrations.transformers"
            )
        return self.schedule


class AlphaDecayCallback(ScheduleCallback):
    """Step AlphaDecay in the Trainer. `use_alpha_decay` creates it."""

    kind = AlphaDecay


class LayerwiseLRCallback(ScheduleCallback):
    """Step LayerwiseLR in the Trainer. `use_layerwise_lr` creates it."""

    kind = LayerwiseLR

    def _complete(self) -> dict[str, Any]:
        # The Trainer counts its updates after it has built the optimizer: `on_train_begin` sets the number.
        return {"num_updates": 1, **self.options}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the schedule after a resume, and tell it how many updates the run has."""
        super().on_train_begin(args, state, control, **kwargs)
        if "num_updates" not in self.options:
            self._schedule().num_updates = state.max_steps


class AssignmentCallback(TrainerCallback):
    """Write a static assignment again after a resume, which restores old decays. `use_assignment` creates it."""

    def __init__(self, assignment: Assignment, options: dict[str, Any]) -> None:
        self._assignment, self._options = assignment, options
        self._decays: list[float] = []

    def attach(self, model: torch.nn.Module, optimizer: Any) -> None:
        """Apply the assignment to an optimizer whose groups may still be split."""
        apply(optimizer, self._assignment, model, **self._options)
        self._decays = _decays(optimizer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Apply the assignment to the current optimizer.

        Raises:
            AssignmentError: if the optimizer's parameters are no longer the model's and its groups have other decays.
        """
        model, optimizer = kwargs["model"], _inner(kwargs["optimizer"])
        if not set(model.parameters()).isdisjoint(_parameters(optimizer)):
            apply(optimizer, self._assignment, model, split=False, **self._options)
        elif _decays(optimizer) != self._decays:
            # DeepSpeed's ZeRO flattens each group into one parameter: nothing can be written there by name.
            raise AssignmentError("the Trainer replaced the optimizer's parameters, and with them their weight decays")


def use_alpha_decay(trainer: Trainer, **options: Any) -> AlphaDecayCallback:
    """Make a Trainer use AlphaDecay. Call this before `trainer.train()`.

        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        use_alpha_decay(trainer, weight_decay=0.1, interval=500)
        trainer.train()

    Args:
        trainer: a Trainer that has not created its optimizer yet.
        options: options of `esdtool.AlphaDecay`, and `log`: what goes to the Trainer's log at each refresh, any of
            `mean`, `role`, `layer`, `module`, by default all. By default `weight_decay` is None: the base is the decay
            of each group (`TrainingArguments.weight_decay`), so parameters that the Trainer does not decay stay without
            decay.

    Returns:
        The callback; its `schedule` holds the alphas and decays.

    Raises:
        AssignmentError: if the Trainer has an optimizer or a schedule already, or DeepSpeed builds its own optimizer.
    """
    options.setdefault("weight_decay", None)
    return _use(trainer, AlphaDecayCallback(**options))


def use_layerwise_lr(trainer: Trainer, **options: Any) -> LayerwiseLRCallback:
    """Make a Trainer use layer-wise learning rates. Call this before `trainer.train()`.

        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        use_layerwise_lr(trainer, interval=100, max_ratio=5)
        trainer.train()

    The ratios multiply the rates of whatever scheduler the Trainer runs; the `learning_rate` that it logs is without
    them. Beside `use_alpha_decay` both share their spectra.

    Args:
        trainer: a Trainer that has not created its optimizer yet.
        options: options of `esdtool.LayerwiseLR`, and `log` as for `use_alpha_decay`. By default
            `num_updates` is the Trainer's.

    Returns:
        The callback; its `schedule` holds the alphas, ratios and learning rates.

    Raises:
        AssignmentError: if the Trainer has an optimizer or such a schedule already, or DeepSpeed builds its own
            optimizer.
    """
    return _use(trainer, LayerwiseLRCallback(**options))


def _use(trainer: Trainer, callback: CallbackT) -> CallbackT:
    """Let a callback build its schedule as soon as the Trainer has created its optimizer."""
    handler, kind = trainer.callback_handler, type(callback)
    if any(isinstance(item, kind) for item in handler.callbacks):
        raise AssignmentError(f"the Trainer has an {callback.kind.name} schedule already")

    def attach(optimizer: Any) -> None:
        # On a resume with restore_callback_states_from_checkpoint the Trainer has put a bare copy in our place.
        handler.callbacks = [callback if isinstance(item, kind) else item for item in handler.callbacks]
        others = [item for item in handler.callbacks if isinstance(item, ScheduleCallback) and item is not callback]
        callback.attach(_model(trainer), _inner(optimizer), others)

    _hook(trainer, attach)
    callback.log = trainer.log
    trainer.add_callback(callback)
    return callback


class SpectralMonitorCallback(TrainerCallback):
    """Step SpectralMonitor in the Trainer. `use_spectral_monitor` creates it."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.monitor: SpectralMonitor | None = None
        """The monitor; None before training begins."""
        self.log: Log | None = None
        """The Trainer's `log`, which reaches every reporter."""
        self.schedules: Callable[[], Sequence[Any]] = tuple
        """Returns the live schedules of the Trainer, whose spectra are shared."""
        self._found: dict[str, float] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the monitor on the model that is trained, and go on counting after a resume."""
        if self.monitor is not None:
            self.monitor.close()
        share = next(iter(self.schedules()), None)
        self.monitor = SpectralMonitor(kwargs["model"], **{"share": share, **self.options})
        if state.global_step > 0:
            self.monitor.resume(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the monitor before the update."""
        if self.monitor is None:
            raise AssignmentError(f"{type(self).__name__} was not attached: use use_spectral_monitor")
        self._found = self.monitor.step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log new numbers under the number of the update."""
        if self._found and self.log is not None:
            self.log(self._found)
        self._found = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the monitor's own writers."""
        if self.monitor is not None:
            self.monitor.close()


def use_spectral_monitor(trainer: Trainer, **options: Any) -> SpectralMonitorCallback:
    """Make a Trainer measure the spectra of its weights. Call this before `trainer.train()`.

        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        use_spectral_monitor(trainer, every=500, levels=("mean", "role"))
        trainer.train()

    The numbers go through `trainer.log` and so to every reporter (TensorBoard, Weights & Biases, ...), as
    `train/alpha/mean` and so on. Any optimizer will do, and any subclass of the Trainer (SFTTrainer, ...). Of a PEFT
    model the updates are measured. Beside `use_alpha_decay` or `use_layerwise_lr` spectra are shared.

    Args:
        trainer: a Trainer.
        options: options of `esdtool.SpectralMonitor`.

    Returns:
        The callback; its `monitor` is there as soon as training begins.

    Raises:
        AssignmentError: if the Trainer has a monitor already.
    """
    handler, callback = trainer.callback_handler, SpectralMonitorCallback(**options)
    if any(isinstance(item, SpectralMonitorCallback) for item in handler.callbacks):
        raise AssignmentError("the Trainer has a SpectralMonitor already")
    callback.log = trainer.log
    callback.schedules = lambda: [
        item.schedule for item in handler.callbacks if isinstance(item, ScheduleCallback) and item.schedule is not None
    ]
    trainer.add_callback(callback)
    return callback


def use_assignment(trainer: Trainer, assignment: Assignment | str | Path, **options: Any) -> None:
    """Make a Trainer use a wd.json. Call this before `trainer.train()`.

    Args:
        trainer: a Trainer that has not created its optimizer yet.
        assignment: the path of a file, or the result of `load_assignment`.
        options: the options `base`, `unlisted` and `strict` of `esdtool.apply`.

    Raises:
        AssignmentError: if the file does not fit, the optimizer exists already, or DeepSpeed builds its own.
    """
    loaded = load_assignment(assignment) if isinstance(assignment, (str, Path)) else assignment
    callback = AssignmentCallback(loaded, options)
    _hook(trainer, lambda optimizer: callback.attach(_model(trainer), _inner(optimizer)))
    trainer.add_callback(callback)


def _hook(trainer: Trainer, attach: Callable[[Any], Any]) -> None:
    """Run `attach` on the optimizer as soon as the Trainer has created it."""
    deepspeed = getattr(trainer.args, "hf_deepspeed_config", None)
    if deepspeed is not None and "optimizer" in deepspeed.config:
        raise AssignmentError(
            "the DeepSpeed configuration has an 'optimizer' block, with which DeepSpeed discards parameter groups: "
            "remove the block, so that the Trainer builds the optimizer"
        )
    if trainer.optimizer is not None:
        raise AssignmentError("the Trainer has an optimizer already: build it with esdtool.param_groups instead")
    create = trainer.create_optimizer

    def create_optimizer(*arguments: Any, **keywords: Any) -> Any:
        optimizer = create(*arguments, **keywords)
        attach(optimizer)
        return optimizer

    trainer.create_optimizer = create_optimizer  # type: ignore[method-assign]


def _model(trainer: Trainer) -> torch.nn.Module:
    """Return the model. A Trainer with `model_init` has none before training starts."""
    if trainer.model is None:
        raise AssignmentError("the Trainer has no model yet")
    return trainer.model


def _inner(optimizer: Any) -> Any:
    """Return the torch optimizer inside the wrapper of accelerate."""
    return getattr(optimizer, "optimizer", optimizer)


def _parameters(optimizer: Any) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _decays(optimizer: Any) -> list[float]:
    return [group["weight_decay"] for group in optimizer.param_groups]
