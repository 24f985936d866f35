"""The training loop: from a configuration to a trained model in a run directory."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from esdtool.errors import CheckpointError, EsdtoolError
from esdtool.train.average import WeightAverage, begin_average
from esdtool.train.base_decay import explanation
from esdtool.train.cautious import CautiousDecay
from esdtool.train.config.loading import check_batch
from esdtool.train.config.train_config import TrainConfig
from esdtool.train.data.batches import count_targets
from esdtool.train.data.open import open_data
from esdtool.train.data.packing import MicroBatch
from esdtool.train.distributed import RankZeroError, Spread, TrainingRanks, open_ranks
from esdtool.train.evaluate import Evaluation, evaluate, summed_loss, to_bfloat16
from esdtool.train.journal import Journal
from esdtool.train.model import build_model
from esdtool.train.norms import clip_gradients, total_norm
from esdtool.train.optimizers import build_optimizers, decay_scope, rate_modules, set_learning_rate, trained_modules
from esdtool.train.parameter_groups import trainable
from esdtool.train.policy import HasSchedule
from esdtool.train.run import directory as run_directory
from esdtool.train.run.checkpoints import (
    check_same_run,
    load_trainer,
    load_weights,
    remove_later,
    save_checkpoint,
    save_final,
    take_snapshot,
)
from esdtool.train.run.log import AVERAGED, RunLog, check_loggers, sync_logs
from esdtool.train.run.manifest import SavedRun
from esdtool.train.run.view import PlainView, open_view
from esdtool.train.schedule import lr_factor
from esdtool.train.seeds import step_seed
from esdtool.train.signals import StopSignals
from esdtool.train.target import make_target


class TrainingDivergedError(EsdtoolError):
    """The loss or the gradient is not finite any more."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of a run."""

    run: Path
    """The run directory."""
    step: int
    """Updates done."""
    evaluation: Evaluation | None
    """Validation at the end; None if the run was stopped before."""
    checkpoint: Path | None
    """The newest checkpoint."""
    stopped_by: int | None = None
    """Number of the signal that stopped the run, or None."""


def train(
    config: TrainConfig, *, resume: str | None = None, quiet: bool = False, remarks: Sequence[str] = ()
) -> TrainResult:
    """Train a model as the configuration says. Under torchrun, every rank calls it.

    torch's random numbers are seeded again at each step, from run.seed, the step and the rank: so a resumed run
    draws what it would have drawn. The caller's generator state is restored at the end.

    Args:
        config: resolved (`load_config`, `config_from_mapping`).
        resume: `auto` to go on from the newest whole checkpoint of the run directory, from the beginning
            if there is none; or the path of a checkpoint; None for a new run.
        quiet: show nothing on stderr.
        remarks: what else to tell the user when the run begins.

    Returns:
        What came out; on every rank the same, except that only the first knows the checkpoint.

    Raises:
        ConfigError: for a configuration that cannot be carried out, or a run directory that is in use.
        CheckpointError: if a checkpoint cannot be loaded.
        OutputError: if the run directory cannot be written.
        TrainingDivergedError: if loss or gradient become NaN or infinite.
    """
    threads = torch.get_num_threads()
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    try:
        with open_ranks(config) as ranks:
            cuda = [ranks.device] if ranks.device.type == "cuda" else []
            with torch.random.fork_rng(devices=cuda):
                ranks.together(lambda: check_batch(config, ranks.world_size))
                view = open_view(config.schedule.steps, quiet=quiet or not ranks.is_first)
                try:
                    return _Run(config, ranks, view, resume=resume, remarks=remarks).go()
                finally:
                    view.close()
    finally:
        torch.set_num_threads(threads)


class _Run:
    """One run on one rank."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: TrainingRanks,
        view: PlainView,
        *,
        resume: str | None,
        remarks: Sequence[str],
    ) -> None:
        """Build everything, or restore it."""
        self.config, self.ranks, self.view = config, ranks, view
        view.phase("looking for a checkpoint" if resume else "looking at the run directory")
        self.run = Path(config.run_dir)
        saved, found = ranks.together(lambda: run_directory.find(self.run, resume))
        remarks = [*remarks, *found, *(ranks.together(lambda: check_same_run(saved, config)) if saved else [])]
        # Only looked at here; made when everything else is there, so that a mistake leaves nothing behind.
        ranks.on_first(lambda: run_directory.check_unused(self.run, resume=resume))
        ranks.together(lambda: check_loggers(config))

        self.data = ranks.together(
            lambda: open_data(config, rank=ranks.rank, world_size=ranks.world_size, on_phase=view.phase)
        )
        view.phase("building the model")
        model = ranks.together(
            lambda: build_model(config, vocab_size=self.data.vocab_size, tokenizer=self.data.tokenizer)
        )
        if config.precision.name == "bf16":
            to_bfloat16(model)
        self.model = model
        scope = ranks.together(lambda: decay_scope(model, config))
        if scope.remark is not None and config.weight_decay.differs_by_module:
            remarks.append(f"warning: {scope.remark}" if scope.is_surprising else scope.remark)
        modules = trained_modules(model, scope)
        rated = ranks.together(lambda: rate_modules(model, config))
        self.spread = Spread(model, config, ranks)
        self.optimizers = build_optimizers(self.spread.model, config, modules)
        if saved is not None:
            view.phase(f"loading {saved.path}")
            load_weights(saved, model)
        self.view.phase("computing the first spectra")
        if (words := explanation(config, self.spread.model)) is not None:
            remarks.append(words)
        resuming = saved is not None
        self.policy = config.weight_decay.start(
            make_target(config, self.spread.model, self.optimizers, modules, resuming=resuming)
        )
        self.rates = config.learning_rate.start(
            make_target(config, self.spread.model, self.optimizers, rated, resuming=resuming),
            self.policy.schedule if isinstance(self.policy, HasSchedule) else None,
        )
        if config.weight_decay.cautious:
            CautiousDecay(self.optimizers)  # after the learning rates, of whose product it makes use
        self.average = begin_average(self.spread.model, config)
        self.step = 0
        """Updates done."""
        self.window = {"loss": 0.0, "targets": 0.0, "steps": 0.0}
        """Sums since the last line of training metrics; `steps` counts what the speed is measured over."""
        self.evaluation_due = False
        """Whether a signal stopped the run before the evaluation of this step."""
        if saved is not None:
            self._restore(saved)

        by_name = {module.name: module for module in [*rated, *modules]}
        view.begin(by_name)
        self.newest = saved.path if saved else None

        def open_log() -> RunLog:
            run_directory.claim(self.run, config)
            removed = remove_later(self.run, self.step)
            remarks.extend(f"removed {path}: the run goes on from before it" for path in removed)
            return RunLog(
                self.run,
                config,
                by_name,
                start_step=self.step,
                evaluation_due=self.evaluation_due,
                resumed=saved is not None,
            )

        self.journal = Journal(
            ranks.on_first(open_log),
            view,
            config=config,
            optimizers=self.optimizers,
            mean_ratio=None if self.rates is None else self.rates.mean_ratio,
        )
        for remark in remarks:
            self.view.note(remark)
        if saved is not None:
            self.view.note(f"going on from {saved.path}")
        else:
            if (record := self.policy.initial()) is not None:
                self.journal.decay(0, record)
            if self.rates is not None and (rates := self.rates.initial()) is not None:
                self.journal.rates(0, rates)
        view.phase("compiling the model" if config.run.compile else "taking the first step")

    def _restore(self, saved: SavedRun) -> None:
        state = load_trainer(saved, self.spread.model, self.optimizers)
        try:
            self.policy.load_state_dict(state["policy"])
            if self.rates is not None:
                self.rates.load_state_dict(state["learning_rate"])
            if self.average is not None and "average" in state:
                self.average.load_state_dict(state["average"])
            self.data.train.load_state_dict(state["data"])
            self.window = {key: float(state["window"][key]) for key in self.window}
            self.evaluation_due = bool(state.get("evaluation_due", False))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{saved.path}: the trainer state is of another version: {error}") from error
        self.step = saved.step

    def go(self) -> TrainResult:
        """All steps, then `RUN/final`."""
        try:
            with StopSignals(self.view.stopping) as signals:
                return self._go(signals)
        finally:
            self.journal.close()

    def _go(self, signals: StopSignals) -> TrainResult:
        config, steps = self.config, self.config.schedule.steps
        evaluation: Evaluation | None = None
        if self.evaluation_due:
            self.view.phase("evaluating, where the run was stopped before it could")
            last_lr = config.optimizer.lr * lr_factor(config, self.step - 1)
            self.journal.evaluation(self.step, self._evaluate(), last_lr)
            self.evaluation_due = False
        seconds = 0.0
        while self.step < steps:
            began = time.perf_counter()
            stop, norm, lr = self._update(signals)
            seconds += time.perf_counter() - began
            self.view.phase("")
            self.view.step(self.step)
            is_end = self.step == steps
            if self.step == 1 or is_end or self.step % config.logging.every == 0:
                self._note_training(norm, lr, seconds)
                seconds = 0.0
            is_evaluated = is_end or self.step % config.eval.every == 0
            # Whoever stops a run may not wait for an evaluation: the process that resumes it makes up for it.
            self.evaluation_due = is_evaluated and stop is not None and not is_end
            if is_evaluated and not self.evaluation_due:
                self.view.phase("evaluating")
                evaluation = self._evaluate()
                self.journal.evaluation(self.step, evaluation, lr)
                if is_end and self.average is not None:
                    self._evaluate_average(self.average, lr)
            if is_end or stop is not None or self.step % config.checkpoint.every == 0:
                self.view.phase("saving a checkpoint")
                self._save(final=is_end)
            self.view.phase("")
            if stop is not None and not is_end:
                return self._result(None, stopped_by=stop)
        if evaluation is None:  # resumed behind its last step
            evaluation = self._evaluate()
            self._save(final=True)
        return self._result(evaluation)

    def _update(self, signals: StopSignals) -> tuple[int | None, float, float]:
        """One optimizer step. Returns the signal that some rank has received, the gradient norm and the lr."""
        config, ranks = self.config, self.ranks
        factor = lr_factor(config, self.step)
        set_learning_rate(self.optimizers, config, factor)
        torch.manual_seed(step_seed(config.run.seed, self.step, ranks.rank))
        batches = self.data.train.micro_batches(self.step)
        (targets,) = ranks.sum([float(sum(count_targets(batch) for batch in batches))])
        local = self._backward(batches, targets)
        loss, interrupts, terms = ranks.sum(
            [local, float(signals.received == signal.SIGINT), float(signals.received == signal.SIGTERM)]
        )
        gradients = [each.grad for each in trainable(self.spread.model).values() if each.grad is not None]
        norm = total_norm(gradients)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._diverged(loss / max(targets, 1.0), norm)
        used = clip_gradients(gradients, norm, config.optimizer.max_grad_norm)
        record = self.policy.step(used)
        rates = None if self.rates is None else self.rates.step()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        self.window["loss"] += loss
        self.window["targets"] += targets
        self.window["steps"] += 1
        if record is not None:
            self.journal.decay(self.step, record)
        if rates is not None:
            self.journal.rates(self.step, rates)
        stop = signal.SIGINT if interrupts else signal.SIGTERM if terms else None
        return stop, norm, config.optimizer.lr * factor

    def _backward(self, batches: Sequence[MicroBatch], targets: float) -> float:
        """Accumulate the gradient of the mean loss over all ranks' targets. Returns this rank's sum of losses."""
        total = torch.zeros((), device=self.ranks.device, dtype=torch.float64)
        # DDP and FSDP2 average gradients over the ranks.
        scale = self.ranks.world_size / max(targets, 1.0)
        for index, batch in enumerate(batches):
            with self.spread.micro_batch(last=index == len(batches) - 1):
                loss = summed_loss(self.spread.call, batch, device=self.ranks.device, autocast=self._autocast)
                (loss * scale).backward()
            total += loss.detach()
        return float(total)

    def _diverged(self, loss: float, norm: float) -> None:
        """Save the state before this step if the weights are still finite, and stop.

        Raises:
            TrainingDivergedError: always; on ranks other than the first `RankZeroError`, which it reports.
        """
        weights = total_norm(list(trainable(self.spread.model).values()))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if math.isfinite(weights) and self.step > 0:
            self._save(final=False)
        if not self.ranks.is_first:
            raise RankZeroError("the training has diverged, as rank 0 says")
        where = f"the last good state is {self.newest}" if self.newest else "there is no checkpoint yet"
        raise TrainingDivergedError(
            f"step {self.step + 1}: the loss is {loss:.6g} and the gradient norm {norm:.6g}; {where}; "
            "lower optimizer.lr, lengthen schedule.warmup_steps or set optimizer.max_grad_norm"
        )

    @property
    def _autocast(self) -> bool:
        return self.config.precision.name == "bf16-autocast"

    def _evaluate(self) -> Evaluation:
        return evaluate(self.spread.model, self.data.validation, ranks=self.ranks, autocast=self._autocast)

    def _evaluate_average(self, average: WeightAverage, lr: float) -> None:
        """Evaluate the mean of the last weights, whose line follows that of the final ones."""
        with average.in_place():
            self.spread.weights_changed()
            evaluation = self._evaluate()
        self.spread.weights_changed()
        self.journal.evaluation(self.step, evaluation, lr, split=AVERAGED, averaged_steps=average.count)

    def _note_training(self, norm: float, lr: float, seconds: float) -> None:
        """Note the steps since the last such line, and begin a new sum."""
        window, self.window = self.window, {"loss": 0.0, "targets": 0.0, "steps": 0.0}
        # After a resume the window holds more steps than this process has timed.
        tokens = self.config.tokens_per_step * window["steps"]
        self.journal.training(
            self.step,
            loss=window["loss"] / max(window["targets"], 1.0),
            lr=lr,
            norm=norm,
            tokens_per_second=tokens / seconds if seconds > 0 else None,
        )

    def _save(self, *, final: bool) -> None:
        """A checkpoint of now, and `RUN/final` at the end. All ranks take part."""
        # What is timed after a resume must not count the steps timed here.
        trainer = {
            "policy": self.policy.state_dict(),
            **({} if self.rates is None else {"learning_rate": self.rates.state_dict()}),
            **({} if self.average is None else {"average": self.average.state_dict()}),
            "data": self.data.train.state_dict(self.step),
            "window": {**self.window, "steps": 0.0},
            "evaluation_due": self.evaluation_due,
        }
        snapshot = take_snapshot(self.spread.model, self.optimizers, trainer)

        def write() -> None:
            sync_logs(self.run)
            self.newest = save_checkpoint(
                self.run, self.step, snapshot, model=self.model, tokenizer=self.data.tokenizer, config=self.config
            )
            if final:
                chosen = self.config.checkpoint.final_dtype
                save_final(
                    self.run,
                    snapshot,
                    model=self.model,
                    tokenizer=self.data.tokenizer,
                    dtype=None if chosen == "as-trained" else getattr(torch, chosen),
                )

        self.ranks.on_first(write)

    def _result(self, evaluation: Evaluation | None, stopped_by: int | None = None) -> TrainResult:
        return TrainResult(
            run=self.run, step=self.step, evaluation=evaluation, checkpoint=self.newest, stopped_by=stopped_by
        )
