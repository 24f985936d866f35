"""Training runs side by side, in the terminal and as Markdown."""

from __future__ import annotations

from rich.console import Console

from esdtool.comparison.leading import leading_words
from esdtool.comparison.runs import ComparisonTable
from esdtool.report.tables.runs import PAIRED_HEADINGS, paired_rows, policy_table
from esdtool.report.terminal.console import new_table
from esdtool.support.terminal import new_console, styled

SETTINGS_TITLE = "Validation perplexity at the end: mean ± standard error over seeds"
PAIRED_TITLE = "Difference in perplexity, paired by seed"
AVERAGED_TITLE = "The same of the averaged weights"


def print_runs(table: ComparisonTable, *, console: Console | None = None) -> None:
    """Validation perplexity by run, and by setting over the seeds."""
    console = console or new_console()
    keys = sorted({key for row in table.runs for key in row.setting})
    by_run = new_table("Validation perplexity by run")
    for name in ("run", "policy", *keys, "seed", "step"):
        by_run.add_column(styled(name), justify="right" if name in ("seed", "step") else "left")
    averaged = any(row.averaged_perplexity is not None for row in table.runs)
    for name in ("final", *(["averaged"] if averaged else []), "best", "best at"):
        by_run.add_column(name, justify="right")
    for row in table.runs:
        shown = [styled(_text(row.setting.get(key))) for key in keys]
        numbers = [f"{row.final_perplexity:.3f}", f"{row.best_perplexity:.3f}", str(row.best_step)]
        if averaged:
            numbers.insert(1, "-" if row.averaged_perplexity is None else f"{row.averaged_perplexity:.3f}")
        by_run.add_row(styled(row.run), styled(row.policy), *shown, str(row.seed), f"{row.step}/{row.steps}", *numbers)
    console.print(by_run)
    print_settings(table, console=console)


def print_settings(table: ComparisonTable, *, console: Console | None = None) -> None:
    """Policies by base decay, the lowest of each column in bold; and the differences from uniform decay."""
    console = console or new_console()
    arranged = policy_table(table.settings)
    by_base = new_table(SETTINGS_TITLE)
    for name in arranged.headings:
        by_base.add_column(name, justify="left" if name == "policy" else "right")
    for policy, (label, *numbers, seeds) in zip(arranged.rows, arranged.shown(), strict=True):
        best = [cell is not None and arranged.is_best(column, cell) for column, cell in enumerate(policy.cells)]
        marked = [styled(number, "bold" if bold else "") for number, bold in zip(numbers, best, strict=True)]
        by_base.add_row(styled(label), *marked, seeds)
    console.print(by_base)
    if len(table.settings) > 1:
        leading = leading_words(table)
        console.print(styled(f"{leading[:1].upper()}{leading[1:]}."))
    for title, is_averaged in ((PAIRED_TITLE, False), (AVERAGED_TITLE, True)):
        found = paired_rows(table.settings, averaged=is_averaged)
        if not found:
            continue
        differences = new_table(title)
        for name in PAIRED_HEADINGS:
            differences.add_column(name, justify="left" if name in PAIRED_HEADINGS[:2] else "right")
        for cells in found:
            differences.add_row(*map(styled, cells))
        console.print(differences)


def _text(value: object) -> str:
    return "-" if value is None else str(value)
