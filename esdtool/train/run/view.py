"""What the user sees while a run goes on, on stderr: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from esdtool.modules import WeightModule
from esdtool.support.terminal import new_console, remark
from esdtool.support.words import visible
from esdtool.train.policy import DecayRecord
from esdtool.train.run.log import by_role

if TYPE_CHECKING:
    from rich.table import Table


class PlainView:
    """One line for each thing that happens."""

    def __init__(self, total_steps: int, modules: Mapping[str, WeightModule]) -> None:
        """Take the run's length, for the remaining time, and its modules, for alphas by role."""
        self._total_steps = total_steps
        self._modules = modules
        self._started: tuple[float, int] | None = None

    def note(self, text: str) -> None:
        """Make a remark."""
        remark(text)

    def metrics(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        text = f"step {line['step']}/{self._total_steps}  {line['split']:<10}  loss {line['loss']:.4f}  "
        text += f"perplexity {line['perplexity']:.2f}"
        if line["split"] == "train":
            norm, speed, decay = line["grad_norm"], line["tokens_per_second"], line["weight_decay_mean"]
            text += f"  lr {line['lr']:.3g}  grad norm {norm:.3g}  {speed:,.0f} tokens/s  mean decay {decay:.4g}"
            text += f"  ETA {self.remaining(line['step'])}"
        self.show(text)

    def decay(self, step: int, record: DecayRecord) -> None:
        """A line of decay.jsonl."""
        if not record.modules:
            return
        decays = [decay.weight_decay for decay in record.modules.values()]
        text = f"step {step}/{self._total_steps}  decays {min(decays):.4g} to {max(decays):.4g}"
        alphas = [decay.alpha for decay in record.modules.values() if decay.alpha is not None]
        if alphas:
            text += f" from alphas {min(alphas):.3f} to {max(alphas):.3f} in {record.seconds:.2f} s"
        self.show(text)

    def show(self, text: str) -> None:
        """Put out one line."""
        print(visible(text), file=sys.stderr, flush=True)

    def remaining(self, step: int) -> str:
        """Time to the end, `h:mm:ss`, at the pace since this process began; `-` at its start."""
        now = time.monotonic()
        if self._started is None:
            self._started = now, step
            return "-"
        since, first = self._started
        if step == first:
            return "-"
        seconds = round((now - since) / (step - first) * (self._total_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def close(self) -> None:
        """The run is over."""


class LiveView(PlainView):
    """A table that stays in its place: progress, loss, alpha by role and the range of the decays."""

    def __init__(self, total_steps: int, modules: Mapping[str, WeightModule]) -> None:
        """Start drawing."""
        from rich.live import Live

        super().__init__(total_steps, modules)
        self._train: Mapping[str, Any] | None = None
        self._validation: Mapping[str, Any] | None = None
        self._record: tuple[int, DecayRecord] | None = None
        self._eta = "-"
        self._live = Live(console=new_console(stderr=True), auto_refresh=False, redirect_stdout=False)
        self._live.start()

    def note(self, text: str) -> None:
        """A remark, above the table."""
        self._live.console.print(f"esdtool: {visible(text)}")

    def metrics(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if line["split"] == "train":
            self._train, self._eta = line, self.remaining(line["step"])
        else:
            self._validation = line
        self._live.update(self._table(), refresh=True)

    def decay(self, step: int, record: DecayRecord) -> None:
        """A line of decay.jsonl."""
        if record.modules:
            self._record = step, record
            self._live.update(self._table(), refresh=True)

    def close(self) -> None:
        """Leave the last table on the screen."""
        self._live.stop()

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="dim")
        table.add_column()
        if (line := self._train) is not None:
            step = int(line["step"])
            filled = 30 * step // self._total_steps
            counts = f" {step:,}/{self._total_steps:,}  ETA {self._eta}"
            table.add_row("step", Text.assemble("━" * filled, ("━" * (30 - filled), "dim"), counts))
            table.add_row("train", f"loss {line['loss']:.4f}  perplexity {line['perplexity']:.2f}")
            table.add_row(
                "",
                f"lr {line['lr']:.3g}  grad norm {line['grad_norm']:.3g}  {line['tokens_per_second']:,.0f} tokens/s",
            )
        if (line := self._validation) is not None:
            table.add_row(
                "validation", f"loss {line['loss']:.4f}  perplexity {line['perplexity']:.2f}  (step {line['step']:,})"
            )
        if self._record is not None:
            step, record = self._record
            means = by_role(record, self._modules)
            decays = [decay.weight_decay for decay in record.modules.values()]
            table.add_row("decay", f"{min(decays):.4g} to {max(decays):.4g}  (since step {step:,})")
            for role, decay in means["weight_decay"].items():
                alpha = means["alpha"].get(role)
                shown = f"alpha {alpha:.3f}  " if alpha is not None else ""
                table.add_row(f"  {role}", f"{shown}decay {decay:.4g}")
        return table


class NoView(PlainView):
    """Says nothing: for ranks other than the first, and where the caller wants it so."""

    def __init__(self) -> None:
        """Nothing to know."""
        super().__init__(0, {})

    def note(self, text: str) -> None:
        """Nothing."""

    def show(self, text: str) -> None:
        """Nothing."""


def open_view(total_steps: int, modules: Mapping[str, WeightModule], *, quiet: bool) -> PlainView:
    """The view for this stderr."""
    if quiet:
        return NoView()
    return LiveView(total_steps, modules) if sys.stderr.isatty() else PlainView(total_steps, modules)
