"""Finished runs side by side: perplexity by run and by setting, mean and spread over seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from esdtool.errors import ConfigError
from esdtool.train.config import load_config
from esdtool.train.run_log import CONFIG, DECAY, METRICS, read_lines

# What may differ between runs of one setting: it changes no number that is compared, or is the seed itself.
_IGNORED: Final = frozenset({"run.seed", "run.dir", "run.device", "run.threads", "run.distributed", "run.compile"})
_IGNORED_SECTIONS: Final = frozenset({"logging", "checkpoint"})
_TEXT_KEYS: Final = ("data.", "tokenizer.", "batch.sequence_length", "eval.tokens")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory, as far as it got."""

    path: Path
    settings: dict[str, Any]
    """Every key of its configuration, `section.key`."""
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    decays: list[dict[str, Any]]
    """Lines of decay.jsonl; empty if there is none."""

    @property
    def validation(self) -> list[dict[str, Any]]:
        """Lines with a validation loss, in order."""
        return [line for line in self.metrics if line["split"] == "validation" and line["loss"] is not None]

    @property
    def steps_done(self) -> int:
        """Last step that was logged."""
        return max((int(line["step"]) for line in self.metrics), default=0)


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run in the table."""

    run: str
    policy: str
    seed: int
    step: int
    """Last step that was logged."""
    steps: int
    """Steps of the whole run."""
    final_perplexity: float
    best_perplexity: float
    best_step: int
    setting: dict[str, Any]
    """The keys in which the runs differ, besides the seed."""


@dataclass(frozen=True, kw_only=True)
class SettingRow:
    """Runs that differ in nothing but the seed."""

    policy: str
    setting: dict[str, Any]
    seeds: tuple[int, ...]
    final_mean: float
    final_std: float | None
    """Sample standard deviation; None for one seed."""
    best_mean: float
    best_std: float | None


@dataclass(frozen=True, kw_only=True)
class ComparisonTable:
    """What `esdtool compare` prints."""

    runs: tuple[RunRow, ...]
    settings: tuple[SettingRow, ...]
    """Best mean of the final perplexity first."""
    notes: tuple[str, ...]
    """Why numbers may not be comparable, one line each."""

    def to_json(self) -> str:
        """As JSON, `runs` and `settings` as lists of objects."""
        document = {
            "format": "esdtool.comparison",
            "version": 1,
            "runs": [asdict(row) for row in self.runs],
            "settings": [asdict(row) for row in self.settings],
            "notes": self.notes,
        }
        return json.dumps(document, indent=2, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """One line per run; the differing keys are columns of their own."""
        keys = sorted({key for row in self.runs for key in row.setting})
        fields = ["run", "policy", "seed", "step", "steps", "final_perplexity", "best_perplexity", "best_step", *keys]
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fields, lineterminator="\n")
        writer.writeheader()
        for row in self.runs:
            values = {name: value for name, value in asdict(row).items() if name != "setting"}
            writer.writerow(values | row.setting)
        return buffer.getvalue()


def load_run(path: str | Path) -> Run:
    """Read a run directory.

    Raises:
        ConfigError: if it is none, or has no validation result yet.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file() or not (folder / METRICS).is_file():
        raise ConfigError(f"{folder}: no run directory of `esdtool train`: {CONFIG} or {METRICS} is missing")
    document = load_config(folder / CONFIG).model_dump(by_alias=True, mode="json")
    run = Run(
        path=folder,
        settings={f"{section}.{key}": value for section, values in document.items() for key, value in values.items()},
        metrics=read_lines(folder / METRICS),
        decays=read_lines(folder / DECAY) if (folder / DECAY).is_file() else [],
    )
    if not run.validation:
        raise ConfigError(f"{folder}: the run has no validation result yet")
    return run


def compare_runs(runs: Sequence[Run]) -> ComparisonTable:
    """Rows of all runs, and those that differ only in the seed put together."""
    differing = _differing(runs)
    rows = [_row(run, differing) for run in runs]
    together: dict[str, list[RunRow]] = {}
    for row in rows:
        together.setdefault(json.dumps([row.policy, row.setting], sort_keys=True), []).append(row)
    settings = sorted((_setting(found) for found in together.values()), key=lambda row: row.final_mean)
    return ComparisonTable(runs=tuple(rows), settings=tuple(settings), notes=tuple(_notes(rows, differing)))


def _differing(runs: Sequence[Run]) -> list[str]:
    """Keys that have several values among the runs, apart from seeds and the like."""
    keys = sorted({key for run in runs for key in run.settings})
    return [
        key
        for key in keys
        if key not in _IGNORED
        and key.partition(".")[0] not in _IGNORED_SECTIONS
        and len({json.dumps(run.settings.get(key), sort_keys=True) for run in runs}) > 1
    ]


def _row(run: Run, differing: Sequence[str]) -> RunRow:
    best = min(run.validation, key=lambda line: line["loss"])
    return RunRow(
        run=str(run.path),
        policy=run.settings["weight_decay.policy"],
        seed=run.settings["run.seed"],
        step=run.steps_done,
        steps=run.settings["schedule.steps"],
        final_perplexity=math.exp(run.validation[-1]["loss"]),
        best_perplexity=math.exp(best["loss"]),
        best_step=best["step"],
        setting={key: run.settings.get(key) for key in differing if key != "weight_decay.policy"},
    )


def _setting(rows: Sequence[RunRow]) -> SettingRow:
    final, best = [row.final_perplexity for row in rows], [row.best_perplexity for row in rows]
    several = len(rows) > 1
    return SettingRow(
        policy=rows[0].policy,
        setting=rows[0].setting,
        seeds=tuple(row.seed for row in rows),
        final_mean=statistics.fmean(final),
        final_std=statistics.stdev(final) if several else None,
        best_mean=statistics.fmean(best),
        best_std=statistics.stdev(best) if several else None,
    )


def _notes(rows: Sequence[RunRow], differing: Sequence[str]) -> list[str]:
    text = [key for key in differing if key.startswith(_TEXT_KEYS)]
    notes = [f"the runs differ in {', '.join(text)}: their perplexities are not of the same text"] if text else []
    notes += [f"{row.run} is at step {row.step} of {row.steps}" for row in rows if row.step < row.steps]
    return notes
