"""Write what the runs of the study with little text left behind as CSV, small enough to keep.

    python examples/study/record.py [runs/study/limited] [examples/study/results]

limited-runs.csv has a line for each run, limited-curves.csv its losses, and limited-alphas.csv mean and spread of alpha
over the weight modules: at each refresh of the policies that measure it, and of the final weights of every run.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from esdtool import analyze
from esdtool.comparison.runs import Run, compare_runs, has_result, load_run
from esdtool.support.csv_text import csv_text
from esdtool.support.files import atomic_write_text

KEYS = (
    "weight_decay.policy",
    "weight_decay.base",
    "weight_decay.control",
    "weight_decay.max_ratio",
    "learning_rate.policy",
    "learning_rate.control",
    "optimizer.lr",
    "schedule.steps",
)


def main(runs: Path, results: Path) -> None:
    """Read every finished run below a folder, and write the three files."""
    found = [load_run(path.parent) for path in sorted(runs.rglob("metrics.jsonl")) if has_result(path.parent)]
    found = [run for run in found if run.steps_done == run.settings["schedule.steps"] and (run.path / "final").is_dir()]
    if not found:
        sys.exit(f"{runs}: no finished run")
    rows = [(place(run, runs), run) for run in found]
    write(results / "limited-runs.csv", [where | summary(run) for where, run in rows])
    write(results / "limited-curves.csv", [where | point for where, run in rows for point in curve(run)])
    write(results / "limited-alphas.csv", [where | line for where, run in rows for line in alphas(run)])
    print(f"{len(found)} runs in {results}")


def place(run: Run, runs: Path) -> dict[str, Any]:
    """The sweep, the setting and the seed of a run, from its folder SWEEP/SETTING/seed-N."""
    sweep, setting, _ = run.path.relative_to(runs).parts
    return {"sweep": sweep, "setting": setting, "seed": run.settings["run.seed"]}


def summary(run: Run) -> dict[str, Any]:
    """The settings of a run and its results."""
    (row,) = compare_runs([run]).runs
    settings = {key: run.settings.get(key) for key in KEYS}
    if row.policy == "none":
        settings["weight_decay.base"] = None
    return settings | {
        "mean_decay": row.mean_decay,
        "final_perplexity": row.final_perplexity,
        "averaged_perplexity": row.averaged_perplexity,
        "best_perplexity": row.best_perplexity,
        "best_step": row.best_step,
    }


def curve(run: Run) -> Iterable[dict[str, Any]]:
    """The losses over the steps."""
    for line in run.metrics:
        yield {"step": line["step"], "split": line["split"], "loss": round(line["loss"], 5)}


def alphas(run: Run) -> Iterable[dict[str, Any]]:
    """Mean and standard deviation of alpha over the modules, by step; the last line is of the final weights."""
    for line in run.decays:
        modules: Mapping[str, Mapping[str, Any]] = line["modules"]
        measured = [module["alpha"] for module in modules.values() if module.get("alpha") is not None]
        if measured:
            yield spread(line["weights_step"], measured)
    yield spread(run.steps_done, [module.alpha for module in analyze(run.path / "final").scored])


def spread(step: int, measured: Iterable[float | None]) -> dict[str, Any]:
    """One line of limited-alphas.csv."""
    values = [value for value in measured if value is not None]
    return {
        "step": step,
        "alpha_mean": round(statistics.fmean(values), 4),
        "alpha_deviation": round(statistics.pstdev(values), 4),
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the same keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, csv_text(list(rows[0]), rows))


if __name__ == "__main__":
    main(*map(Path, [*sys.argv[1:], *("runs/study/limited", "examples/study/results")[len(sys.argv) - 1 :]]))
