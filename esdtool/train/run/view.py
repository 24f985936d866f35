"""Show the progress of a run on stderr: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from esdtool.modules import WeightModule
from esdtool.support.terminal import new_console, remark
from esdtool.support.words import visible
from esdtool.train.learning_rate import RateRecord
from esdtool.train.policy import DecayRecord
from esdtool.train.run.log import by_role

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_LONG_PHASE: Final = 20.0
"""Seconds after which a phase is worth a line of its own where there is no terminal."""


class PlainView:
    """One line for each thing that happens."""

    def __init__(self, total_steps: int) -> None:
        """Take the run's length, for the remaining time."""
        self._total_steps = total_steps
        self._modules: Mapping[str, WeightModule] = {}
        self._pace: tuple[float, int] | None = None
        self._waiting: threading.Timer | None = None

    def begin(self, modules: Mapping[str, WeightModule]) -> None:
        """Take the run's modules, for alphas by role: from here on there are steps."""
        self._modules = modules

    def phase(self, text: str) -> None:
        """Say what is being done before the first step, or in it; only if it takes long. Empty: nothing any more."""
        self._stop_waiting()
        if text:
            self._waiting = threading.Timer(_LONG_PHASE, self.note, [f"{text} ..."])
            self._waiting.daemon = True
            self._waiting.start()

    def step(self, step: int) -> None:
        """Hear that an update is done."""
        self._stop_waiting()
        if self._pace is None:
            self._pace = time.monotonic(), step

    def stopping(self, number: int) -> None:
        """Acknowledge a signal. Called in its handler: nothing that the interrupted code may hold is used."""
        name = signal.Signals(number).name
        text = f"\nesdtool: {name}: saving a checkpoint after this step; once more to end at once\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())

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
            text += f"  ETA {self._remaining(line['step'])}"
        self._show(text)

    def decay(self, step: int, record: DecayRecord) -> None:
        """A line of decay.jsonl."""
        if not record.modules:
            return
        decays = [decay.weight_decay for decay in record.modules.values()]
        text = f"step {step}/{self._total_steps}  decays {min(decays):.4g} to {max(decays):.4g}"
        alphas = [decay.alpha for decay in record.modules.values() if decay.alpha is not None]
        if alphas:
            text += f" from alphas {min(alphas):.3f} to {max(alphas):.3f} in {record.seconds:.2f} s"
        self._show(text)

    def rates(self, step: int, record: RateRecord) -> None:
        """A line of learning_rate.jsonl."""
        if not record.modules:
            return
        ratios = [rate.ratio for rate in record.modules.values()]
        span = f"{min(ratios):.4g} to {max(ratios):.4g}"
        self._show(f"step {step}/{self._total_steps}  learning rates {span} times the schedule's")

    def close(self) -> None:
        """Hear that the run is over."""
        self._stop_waiting()

    def _show(self, text: str) -> None:
        print(visible(text), file=sys.stderr, flush=True)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _remaining(self, step: int) -> str:
        """Time to the end, `h:mm:ss`, at the pace since the first step of this process; `-` until there is one."""
        since, first = self._pace or (0.0, step)
        if step == first:
            return "-"
        seconds = round((time.monotonic() - since) / (step - first) * (self._total_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


class LiveView(PlainView):
    """A bar that moves at every step, and a table that stays in its place: loss, alpha by role and the decays."""

    def __init__(self, total_steps: int) -> None:
        """Start drawing."""
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        super().__init__(total_steps)
        self._train: Mapping[str, Any] | None = None
        self._validation: Mapping[str, Any] | None = None
        self._record: tuple[int, DecayRecord] | None = None
        self._rates: tuple[int, RateRecord] | None = None
        self._preparing = Progress(SpinnerColumn(), TextColumn("{task.description}", markup=False))
        self._phase = self._preparing.add_task("starting", total=None)
        self._steps = Progress(
            TextColumn("step"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA {task.fields[remaining]}")
        )
        self._bar = self._steps.add_task("step", total=total_steps, remaining="-", visible=False)
        self._live = Live(
            console=new_console(stderr=True),
            refresh_per_second=8,
            redirect_stdout=False,
            get_renderable=self._drawn,
        )
        self._live.start()

    def phase(self, text: str) -> None:
        """Show what is being done."""
        self._preparing.update(self._phase, description=text, visible=bool(text))

    def step(self, step: int) -> None:
        """Move the bar."""
        super().step(step)
        self._steps.update(self._bar, completed=step, remaining=self._remaining(step), visible=True)

    def note(self, text: str) -> None:
        """A remark, above the table."""
        self._live.console.print(f"esdtool: {visible(text)}")

    def metrics(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if line["split"] == "train":
            self._train = line
        elif line["split"] == "validation":
            self._validation = line
        else:
            steps, value = line["averaged_steps"], line["perplexity"]
            self.note(f"the mean of the weights over the last {steps} steps has a perplexity of {value:.2f}")

    def decay(self, step: int, record: DecayRecord) -> None:
        """A line of decay.jsonl."""
        if record.modules:
            self._record = step, record

    def rates(self, step: int, record: RateRecord) -> None:
        """A line of learning_rate.jsonl."""
        if record.modules:
            self._rates = step, record

    def close(self) -> None:
        """Leave the last table on the screen."""
        super().close()
        self._preparing.update(self._phase, visible=False)
        self._live.stop()

    def _drawn(self) -> RenderableType:
        from rich.console import Group

        return Group(self._preparing, self._steps, self._table())

    def _table(self) -> Table:
        from rich.table import Table

        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="dim")
        table.add_column()
        if (line := self._train) is not None:
            table.add_row("train", f"loss {line['loss']:.4f}  perplexity {line['perplexity']:.2f}")
            table.add_row(
                "",
                f"lr {line['lr']:.3g}  grad norm {line['grad_norm']:.3g}  {line['tokens_per_second']:,.0f} tokens/s",
            )
        if (line := self._validation) is not None:
            table.add_row(
                "validation", f"loss {line['loss']:.4f}  perplexity {line['perplexity']:.2f}  (step {line['step']:,})"
            )
        if self._rates is not None:
            since, ratios = self._rates[0], [rate.ratio for rate in self._rates[1].modules.values()]
            table.add_row("lr ratio", f"{min(ratios):.4g} to {max(ratios):.4g}  (since step {since:,})")
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
        """Need nothing."""
        super().__init__(0)

    def phase(self, text: str) -> None:
        """Say nothing."""

    def stopping(self, number: int) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def _show(self, text: str) -> None:
        """Say nothing."""


def open_view(total_steps: int, *, quiet: bool) -> PlainView:
    """Return the view for this stderr."""
    if quiet:
        return NoView()
    return LiveView(total_steps) if sys.stderr.isatty() else PlainView(total_steps)
