"""Training runs side by side in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from esdtool.report.console import new_table, stdout_console
from esdtool.train.compare import ComparisonTable


def print_runs(table: ComparisonTable, *, console: Console | None = None) -> None:
    """Validation perplexity by run, and by setting over the seeds."""
    console = console or stdout_console()
    keys = sorted({key for row in table.runs for key in row.setting})
    by_run = new_table("Validation perplexity by run")
    for name in ("run", "policy", *keys, "seed", "step"):
        by_run.add_column(escape(name), justify="right" if name in ("seed", "step") else "left")
    for name in ("final", "best", "best at"):
        by_run.add_column(name, justify="right")
    for row in table.runs:
        shown = [escape(_text(row.setting.get(key))) for key in keys]
        numbers = [f"{row.final_perplexity:.3f}", f"{row.best_perplexity:.3f}", str(row.best_step)]
        by_run.add_row(escape(row.run), row.policy, *shown, str(row.seed), f"{row.step}/{row.steps}", *numbers)
    console.print(by_run)
    by_setting = new_table("Mean and standard deviation over seeds")
    for name in ("policy", *keys):
        by_setting.add_column(escape(name))
    for name in ("seeds", "final", "best"):
        by_setting.add_column(name, justify="right")
    for setting in table.settings:
        shown = [escape(_text(setting.setting.get(key))) for key in keys]
        final, best = _spread(setting.final_mean, setting.final_std), _spread(setting.best_mean, setting.best_std)
        by_setting.add_row(setting.policy, *shown, str(len(setting.seeds)), final, best)
    console.print(by_setting)


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"
