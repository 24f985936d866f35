"""Runs side by side: perplexity by run and by setting, mean and standard error over seeds, and against uniform."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from esdtool.comparison.paired import Paired, corrected, paired, standard_error
from esdtool.errors import ConfigError, UsageError
from esdtool.support.csv_text import csv_text
from esdtool.train.config.loading import load_run_config
from esdtool.train.config.train_config import is_immaterial
from esdtool.train.learning_rates import load_learning_rates
from esdtool.train.run.log import AVERAGED, CONFIG, DECAY, METRICS, read_lines

BASE: Final = "weight_decay.base"
RATES: Final = "learning_rate.policy"
_COMPARED: Final = ("weight_decay.", "learning_rate.")
"""Sections of the policies that are compared with uniform values."""
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
        return [line for line in self.metrics if _is_result(line)]

    @property
    def averaged_perplexity(self) -> float | None:
        """Validation perplexity of the mean of the last weights (`eval.average`), or None."""
        found = [line["loss"] for line in self.metrics if line["split"] == AVERAGED and line["loss"] is not None]
        return math.exp(found[-1]) if found else None

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
    mean_decay: float | None
    """Weight decay over all parameters, weighted by their number, and over the logged steps."""
    setting: dict[str, Any]
    """The keys in which the runs differ, besides the seed."""
    averaged_perplexity: float | None = None
    """Perplexity of the mean of the last weights, if `eval.average` asked for it."""


@dataclass(frozen=True, kw_only=True)
class SettingRow:
    """Runs that differ in nothing but the seed. Where some runs are finished, those that are not take no part."""

    policy: str
    setting: dict[str, Any]
    seeds: tuple[int, ...]
    final_mean: float
    final_std: float | None
    """Sample standard deviation; None for one seed."""
    final_standard_error: float | None
    """Standard error of `final_mean`; None for one seed."""
    best_mean: float
    best_std: float | None
    mean_decay: float | None
    """Mean over the runs of the setting."""
    paired: Paired | None = None
    """Against uniform decay, if that was run with at least two of the same seeds."""
    averaged_mean: float | None = None
    """Mean perplexity of the averaged weights; None unless all runs of the setting have it."""
    averaged_standard_error: float | None = None
    averaged_paired: Paired | None = None
    """The same comparison as `paired`, of the averaged weights."""

    @property
    def label(self) -> str:
        """Policy and settings in short.

        >>> SettingRow(policy="uniform", setting={"weight_decay.base": 0.1}, seeds=(0,), final_mean=9.0, final_std=None,
        ...            final_standard_error=None, best_mean=9.0, best_std=None, mean_decay=0.1).label
        'uniform, base 0.1'
        """
        return described(self.policy, self.setting)


@dataclass(frozen=True, kw_only=True)
class ComparisonTable:
    """The comparison of runs that `esdtool compare` prints."""

    runs: tuple[RunRow, ...]
    settings: tuple[SettingRow, ...]
    """Best mean of the final perplexity first."""
    notes: tuple[str, ...]
    """Why numbers may not be comparable, one line each."""

    def to_json(self) -> str:
        """Return the comparison for JSON, with `runs` and `settings` as lists of objects."""
        document = {
            "format": "esdtool.comparison",
            "version": 1,
            "runs": [asdict(row) for row in self.runs],
            "settings": [asdict(row) for row in self.settings],
            "notes": self.notes,
        }
        return json.dumps(document, indent=2, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Return one line per run; the differing keys are columns of their own."""
        keys = sorted({key for row in self.runs for key in row.setting})
        fields = [name for name in RunRow.__dataclass_fields__ if name != "setting"] + keys
        return csv_text(fields, [asdict(row) | row.setting for row in self.runs])


def has_result(run: Path) -> bool:
    """Return whether a run directory has a validation result, without which `load_run` refuses it."""
    return any(map(_is_result, read_lines(run / METRICS)))


def _is_result(line: Mapping[str, Any]) -> bool:
    return line["split"] == "validation" and line["loss"] is not None


def load_run(path: str | Path) -> Run:
    """Read a run directory.

    Raises:
        ConfigError: if it is none, or has no validation result yet.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file() or not (folder / METRICS).is_file():
        raise ConfigError(f"{folder}: no run directory of `esdtool train`: {CONFIG} or {METRICS} is missing")
    run = Run(
        path=folder,
        settings=load_run_config(folder / CONFIG).flat(),
        metrics=read_lines(folder / METRICS),
        decays=read_lines(folder / DECAY) if (folder / DECAY).is_file() else [],
    )
    if not run.validation:
        raise ConfigError(f"{folder}: the run has no validation result yet")
    return run


def compare_runs(runs: Sequence[Run], *, against: str | None = None) -> ComparisonTable:
    """Return the rows of all runs, and those that differ only in the seed put together.

    Args:
        runs: at least one.
        against: label of the setting that all others are compared with, seed by seed. Default: of each its counterpart
            with uniform decay and learning rate, the same in all but [weight_decay] and [learning_rate] and, if there
            is such, with the same base.

    Raises:
        UsageError: if `against` is no label of these runs.
    """
    differing = _differing(runs)
    rows = [_row(run, differing) for run in runs]
    done = [row for row in rows if row.step >= row.steps] or rows
    together: dict[str, list[RunRow]] = {}
    for row in done:
        together.setdefault(_key(row), []).append(row)
    settings = sorted((_setting(found) for found in together.values()), key=lambda row: row.final_mean)
    if against is None:
        counterparts = [_uniform(row, settings) for row in settings]
    else:
        chosen = next((row for row in settings if row.label == against), None)
        if chosen is None:
            labels = ", ".join(repr(row.label) for row in settings)
            raise UsageError(f"no setting is called {against!r}; there are {labels}")
        counterparts = [None if row is chosen else chosen for row in settings]
    finals = {key: {row.seed: row.final_perplexity for row in found} for key, found in together.items()}
    averages = {
        key: {row.seed: row.averaged_perplexity for row in found if row.averaged_perplexity is not None}
        for key, found in together.items()
    }

    def differences(perplexities: Mapping[str, Mapping[int, float]]) -> list[Paired | None]:
        return corrected(
            [
                None if other is None else paired(other.label, perplexities[_key(row)], perplexities[_key(other)])
                for row, other in zip(settings, counterparts, strict=True)
            ]
        )

    settings = [
        replace(row, paired=final, averaged_paired=averaged)
        for row, final, averaged in zip(settings, differences(finals), differences(averages), strict=True)
    ]
    return ComparisonTable(runs=tuple(rows), settings=tuple(settings), notes=tuple(_notes(rows, differing)))


def _differing(runs: Sequence[Run]) -> list[str]:
    """Keys that have several values among the runs that have them, apart from seeds and the like."""
    keys = sorted({key for run in runs for key in run.settings})
    return [
        key
        for key in keys
        if key != "run.seed"
        and not is_immaterial(key)
        and len({json.dumps(run.settings[key], sort_keys=True) for run in runs if key in run.settings}) > 1
    ]


def _row(run: Run, differing: Sequence[str]) -> RunRow:
    best = min(run.validation, key=lambda line: line["loss"])
    decays = [line["weight_decay_mean"] for line in run.metrics if line.get("weight_decay_mean") is not None]
    return RunRow(
        run=str(run.path),
        policy=run.settings["weight_decay.policy"],
        seed=run.settings["run.seed"],
        step=run.steps_done,
        steps=run.settings["schedule.steps"],
        final_perplexity=math.exp(run.validation[-1]["loss"]),
        best_perplexity=math.exp(best["loss"]),
        best_step=best["step"],
        mean_decay=statistics.fmean(decays) if decays else None,
        setting={key: run.settings.get(key) for key in differing if key != "weight_decay.policy"},
        averaged_perplexity=run.averaged_perplexity,
    )


def described(policy: str, setting: Mapping[str, Any]) -> str:
    """Return the policy, and the keys in which the runs differ by their last part: unique among runs of one comparison.

    >>> described("alphadecay", {"weight_decay.base": 0.1, "weight_decay.control": "mean", "weight_decay.path": None})
    'alphadecay, base 0.1, control mean'
    """
    usual = _published(setting.get(RATES))
    parts = [
        f"{_short(key)} {_text(value)}"
        for key, value in sorted(setting.items(), key=lambda item: item[0] != RATES)
        # Where nothing is done to the learning rate, nothing is said of it; nor of what its policy does anyway.
        if value not in (None, "none") and (key, value) != (RATES, "uniform") and (key, value) not in usual
    ]
    return ", ".join([policy, *parts])


def _published(policy: str | None) -> list[tuple[str, Any]]:
    """Return the defaults of a policy of [learning_rate], besides its name, as settings of a run; none without one."""
    model = load_learning_rates().get(policy or "")
    fields = {} if model is None else model.model_fields
    return [(f"learning_rate.{name}", field.default) for name, field in fields.items() if name != "policy"]


def _short(key: str) -> str:
    """Return what a setting is called beside the policy of [weight_decay].

    >>> _short("weight_decay.control"), _short("learning_rate.control"), _short("learning_rate.policy")
    ('control', 'lr control', 'lr')
    """
    section, _, name = key.rpartition(".")
    return ("lr" if key == RATES else f"lr {name}") if section == "learning_rate" else name


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _uniform(row: SettingRow, settings: Sequence[SettingRow]) -> SettingRow | None:
    """Find uniform decay and learning rate, otherwise the same: with the same base if there is such, else the best."""

    def is_uniform(other: SettingRow) -> bool:
        # Where no two runs differ in it, all have the same learning rates.
        return other.policy == "uniform" and other.setting.get(RATES, "uniform") == "uniform"

    def elsewhere(other: SettingRow) -> dict[str, Any]:
        return {key: value for key, value in other.setting.items() if not key.startswith(_COMPARED)}

    if is_uniform(row):
        return None
    same = [other for other in settings if is_uniform(other) and elsewhere(other) == elsewhere(row)]
    of_base = [other for other in same if other.setting.get(BASE) == row.setting.get(BASE) and row.policy != "none"]
    return next(iter(of_base or same), None)


def _key(row: RunRow | SettingRow) -> str:
    return json.dumps([row.policy, row.setting], sort_keys=True)


def _setting(rows: Sequence[RunRow]) -> SettingRow:
    final, best = [row.final_perplexity for row in rows], [row.best_perplexity for row in rows]
    decays = [row.mean_decay for row in rows]
    averaged = [row.averaged_perplexity for row in rows if row.averaged_perplexity is not None]
    all_averaged = len(averaged) == len(rows)
    several = len(rows) > 1
    return SettingRow(
        policy=rows[0].policy,
        setting=rows[0].setting,
        seeds=tuple(row.seed for row in rows),
        final_mean=statistics.fmean(final),
        final_std=statistics.stdev(final) if several else None,
        final_standard_error=standard_error(final),
        best_mean=statistics.fmean(best),
        best_std=statistics.stdev(best) if several else None,
        mean_decay=None if None in decays else statistics.fmean(decay for decay in decays if decay is not None),
        averaged_mean=statistics.fmean(averaged) if all_averaged else None,
        averaged_standard_error=standard_error(averaged) if all_averaged else None,
    )


def _notes(rows: Sequence[RunRow], differing: Sequence[str]) -> list[str]:
    text = [key for key in differing if key.startswith(_TEXT_KEYS)]
    notes = [f"the runs differ in {', '.join(text)}: their perplexities are not of the same text"] if text else []
    young = [row for row in rows if row.step < row.steps]
    apart = "" if len(young) == len(rows) else ": it takes no part in the means"
    return notes + [f"{row.run} is at step {row.step} of {row.steps}{apart}" for row in young]
