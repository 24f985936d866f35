"""Write what the runs of the study left behind as CSV, small enough to keep.

    python examples/study/record.py [runs/study] [examples/study/results]

runs.csv has a line for each run, curves.csv its losses, and alphas.csv mean and spread of alpha over the weight
modules: at each refresh of the policies that measure it, and of the final weights of every run. A run that is recorded
already is replaced if its folder REGIME/SWEEP/SETTING/seed-N is there, and kept if not: so the record outlives the
folders.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from comparisons import read

from esdtool import analyze
from esdtool.comparison.runs import Run, compare_runs, has_result, load_run
from esdtool.support.csv_text import csv_text
from esdtool.support.files import atomic_write_text

PLACE = ("regime", "sweep", "setting", "seed")
"""What names a run."""
KEYS = (
    "model.config",
    "optimizer.name",
    "optimizer.lr",
    "schedule.steps",
    "weight_decay.policy",
    "weight_decay.base",
    "weight_decay.control",
    "weight_decay.interval",
    "weight_decay.assign",
    "learning_rate.policy",
    "learning_rate.control",
)
RESULTS = (
    "mean_decay",
    "final_perplexity",
    "averaged_perplexity",
    "best_perplexity",
    "best_step",
    "train_seconds",
    "refresh_seconds",
)
Line = Mapping[str, Any]


def main(runs: Path, results: Path) -> None:
    """Read every finished run below a folder, and write the three files."""
    found = [run for run in (load_run(path.parent) for path in places(runs)) if is_finished(run)]
    if not found:
        sys.exit(f"{runs}: no finished run")
    placed = [(place(run, runs), run) for run in found]
    write(results / "runs.csv", (*PLACE, *KEYS, *RESULTS), [where | summary(run) for where, run in placed])
    write(
        results / "curves.csv",
        (*PLACE, "step", "split", "loss"),
        [where | point for where, run in placed for point in curve(run)],
    )
    write(
        results / "alphas.csv",
        (*PLACE, "step", "alpha_mean", "alpha_deviation"),
        [where | line for where, run in placed for line in alphas(run)],
    )
    print(f"{len(found)} runs in {results}")


def places(runs: Path) -> Iterable[Path]:
    """The metrics of the runs that have a result."""
    return (path for path in sorted(runs.glob("*/*/*/seed-*/metrics.jsonl")) if has_result(path.parent))


def is_finished(run: Run) -> bool:
    """Whether a run has done all its steps and written its weights."""
    return bool(run.steps_done == run.settings["schedule.steps"]) and (run.path / "final").is_dir()


def place(run: Run, runs: Path) -> dict[str, Any]:
    """The name of a run, from its folder REGIME/SWEEP/SETTING/seed-N."""
    return dict(zip(PLACE, (*run.path.relative_to(runs).parts[:3], run.settings["run.seed"]), strict=True))


def summary(run: Run) -> dict[str, Any]:
    """The settings of a run and its results."""
    (row,) = compare_runs([run]).runs
    settings = {key: run.settings.get(key) for key in KEYS}
    if row.policy == "none":
        settings["weight_decay.base"] = None
    refreshes = [line["seconds"] for line in run.decays if line.get("weights_step") is not None]
    return settings | {
        "mean_decay": row.mean_decay,
        "final_perplexity": row.final_perplexity,
        "averaged_perplexity": row.averaged_perplexity,
        "best_perplexity": row.best_perplexity,
        "best_step": row.best_step,
        "train_seconds": round(train_seconds(run), 1),
        "refresh_seconds": round(sum(refreshes), 2) if refreshes else None,
    }


def train_seconds(run: Run) -> float:
    """Seconds of the steps, from the speed of each stretch between two lines; those of the first step are left out."""
    lines = [line for line in run.metrics if line["split"] == "train"]
    return sum(
        (later["tokens"] - earlier["tokens"]) / later["tokens_per_second"]
        for earlier, later in itertools.pairwise(lines)
        if later["tokens_per_second"]
    )


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
    final = [module.alpha for module in analyze(run.path / "final").scored]
    yield spread(run.steps_done, [alpha for alpha in final if alpha is not None])


def spread(step: int, measured: Sequence[float]) -> dict[str, Any]:
    """One line of alphas.csv."""
    return {
        "step": step,
        "alpha_mean": round(statistics.fmean(measured), 4),
        "alpha_deviation": round(statistics.pstdev(measured), 4),
    }


def write(path: Path, fields: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Write rows, beside those of other runs that the file has, ordered by the names of the runs."""
    new = {name(row) for row in rows}
    kept: list[Line] = [row for row in read(path) if name(row) not in new] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, csv_text(fields, sorted([*kept, *rows], key=order)))


def name(row: Line) -> tuple[str, ...]:
    """What names the run of a row."""
    return tuple(str(row[key]) for key in PLACE)


def order(row: Line) -> tuple[Any, ...]:
    """Where a row stands: by name, and seeds by number; the rows of a run keep their order."""
    return (*name(row)[:-1], int(row["seed"]))


if __name__ == "__main__":
    main(*map(Path, [*sys.argv[1:], *("runs/study", "examples/study/results")[len(sys.argv) - 1 :]]))
