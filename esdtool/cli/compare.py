"""`esdtool compare`: training runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from esdtool.train.compare import ComparisonTable


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of `esdtool train`.", metavar="RUN...")],
    json_path: Annotated[
        str | None, typer.Option("--json", help="Write the comparison as JSON; - for stdout.", metavar="PATH")
    ] = None,
    csv_path: Annotated[
        str | None, typer.Option("--csv", help="Write one CSV line per run; - for stdout.", metavar="PATH")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            help="Folder for figures: loss curves, alpha by role over time, decay by layer and role.", metavar="DIR"
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no tables.")] = False,
) -> None:
    """Compare final and best validation perplexity of runs; runs that differ only in the seed are put together."""
    from esdtool.cli.output import check_outputs, note, write_text

    stdout_is_data = check_outputs(json_path, csv_path)

    from esdtool.train.compare import compare_runs, load_run

    loaded = [load_run(run) for run in runs]
    table = compare_runs(loaded)
    for remark in table.notes:
        note(remark, quiet=quiet)
    if json_path is not None:
        write_text(json_path, table.to_json())
    if csv_path is not None:
        write_text(csv_path, table.to_csv())
    if plots is not None:
        from esdtool.train.compare_plots import save_plots

        for path in save_plots(loaded, plots):
            note(f"wrote {path}", quiet=quiet)
    if not quiet and not stdout_is_data:
        _show(table)


def _show(table: ComparisonTable) -> None:
    from rich.markup import escape

    from esdtool.report.console import new_table, stdout_console

    console = stdout_console()
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
