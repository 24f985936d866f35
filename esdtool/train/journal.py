"""Keep the journal of a run: lines in the files of its directory, and the same lines to the view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from esdtool.train.config.train_config import TrainConfig
from esdtool.train.evaluate import Evaluation
from esdtool.train.learning_rate import RateRecord
from esdtool.train.parameter_groups import mean_decay
from esdtool.train.policy import DecayRecord
from esdtool.train.run.log import RunLog, perplexity
from esdtool.train.run.view import PlainView


class Journal:
    """Writes the metrics and the values in force, on the first rank; elsewhere it does nothing.

    Args:
        log: the files of the run, None on all ranks but the first.
        view: what is shown meanwhile.
        config: of the run.
        optimizers: whose decays are averaged for the metrics.
        mean_ratio: computes the mean ratio of learning rates, where there are any but the base rate.
    """

    def __init__(
        self,
        log: RunLog | None,
        view: PlainView,
        *,
        config: TrainConfig,
        optimizers: Sequence[torch.optim.Optimizer],
        mean_ratio: Callable[[], float | None] | None,
    ) -> None:
        self._log, self._view, self._config = log, view, config
        self._optimizers, self._mean_ratio = optimizers, mean_ratio
        self._remark: str | None = None

    def training(self, step: int, *, loss: float, lr: float, norm: float, tokens_per_second: float | None) -> None:
        """Note the mean loss of the steps since the last such line."""
        more = {"grad_norm": norm, "tokens_per_second": tokens_per_second}
        self._metrics(step, "train", loss, perplexity(loss), lr, more)

    def evaluation(
        self, step: int, evaluation: Evaluation, lr: float, *, split: str = "validation", **more: int
    ) -> None:
        """Note the loss on held-out data."""
        keys = {"grad_norm": None, "tokens_per_second": None, **more}
        self._metrics(step, split, evaluation.loss, evaluation.perplexity, lr, keys)

    def decay(self, step: int, record: DecayRecord) -> None:
        """Note the decays that are in force from now on."""
        if self._log is not None:
            self._log.decay(step, record)
            self._view.decay(step, record)
            self._tell(record.remark)

    def rates(self, step: int, record: RateRecord) -> None:
        """Note the learning rates that are in force from now on."""
        if self._log is not None:
            self._log.rates(step, record)
            self._view.rates(step, record)
            if self._config.weight_decay.policy != "alphadecay":  # which says the same of the same modules
                self._tell(record.remark)

    def close(self) -> None:
        """Close the files."""
        if self._log is not None:
            self._log.close()

    def _metrics(self, step: int, split: str, loss: float, perplexity: float, lr: float, more: dict[str, Any]) -> None:
        if self._log is None:
            return
        line = {
            "step": step,
            "tokens": step * self._config.tokens_per_step,
            "split": split,
            "loss": loss,
            "perplexity": perplexity,
            "lr": lr,
            "grad_norm": more.pop("grad_norm"),
            "tokens_per_second": more.pop("tokens_per_second"),
            "weight_decay_mean": mean_decay(self._optimizers),
            **more,
        }
        if self._mean_ratio is not None:
            line["lr_ratio_mean"] = self._mean_ratio()
        self._log.metrics(line)
        self._view.metrics(line)

    def _tell(self, remark: str | None) -> None:
        """Pass on what a record has to say, unless the last one said it already."""
        if remark != self._remark and remark is not None:
            self._view.note(remark)
        self._remark = remark
