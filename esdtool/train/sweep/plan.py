"""The plan of a sweep: from a TOML file to the configuration of every run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin

from pydantic import Field, ValidationError

from esdtool.errors import ConfigError
from esdtool.train.config.layers import section_choices
from esdtool.train.config.loading import load_config, read_toml
from esdtool.train.config.section import Section, Strings
from esdtool.train.config.train_config import TrainConfig

_Setting = dict[tuple[str, str], Any]
"""Values by (section, key)."""
_POLICY: Final = ("weight_decay", "policy")
_RATES: Final = ("learning_rate", "policy")
_OWN: Final = frozenset({("run", "dir"), ("run", "seed")})
"""Keys that the sweep sets itself."""


class SweepSettings(Section):
    """[sweep] What all runs share."""

    config: str | list[str]
    """TOML file of `esdtool train` that every run begins with; of several, later keys replace earlier ones."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]  # noqa: RUF012 - pydantic copies it
    """Values of run.seed: every setting is run with each."""
    dir: str | None = None
    """Folder of all runs, DIR/NAME/seed-N. Default: runs/ and the name of the sweep's file."""
    jobs: Annotated[int, Field(ge=1)] = 1
    """Runs at a time, each a process of its own."""
    until: Strings = ()
    """One or several rules for stopping, e.g. `alphadecay - mean: ci 0.3%`: seeds are added to these two settings until
    the 95 % interval of their difference in perplexity, paired by seed, is narrower than that."""
    max_seeds: Annotated[int, Field(ge=2)] = 24
    """until: the number of seeds at which it ends in any case."""


class SweepFile(Section):
    """A sweep as its TOML file has it."""

    sweep: SweepSettings
    grid: Annotated[list[dict[str, Any]], Field(min_length=1)]
    """[[grid]], one or several: keys of a training configuration. A list is a list of alternatives, and the runs are
    all combinations of them; a key that takes a list itself needs a list of lists. A key that only some of the policies
    (sources, optimizers, schedules) of one [[grid]] have is for these. `name` names the runs."""


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    """The setting, without the seed; also the name of its folder."""
    seed: int
    config: TrainConfig
    """Resolved; `run.dir` is DIR/NAME/seed-N."""

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.config.run_dir)


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """All runs of a sweep."""

    folder: Path
    jobs: int
    seeds: tuple[int, ...]
    """The seeds of the file, then any that were added."""
    until: tuple[str, ...]
    """Rules for stopping, as the file has them."""
    max_seeds: int
    runs: tuple[SweepRun, ...]
    """All settings with the first seed, then all with the second, ...: a sweep that is stopped half-way has compared
    every setting on as many seeds as were finished."""

    @property
    def names(self) -> tuple[str, ...]:
        """The settings, in the order of the file."""
        return tuple(dict.fromkeys(run.name for run in self.runs))


def plan_sweep(
    path: str | Path, overrides: Sequence[str] = (), *, more_seeds: int = 0, of: Collection[str] = ()
) -> SweepPlan:
    """Read a sweep and check the configuration of every run, before any is begun.

    Args:
        path: TOML file with [sweep] and [[grid]]; paths in it are relative to the working directory.
        overrides: `section.key=value` each, for all runs; they replace what the file's base configuration says, but not
            what its grid says.
        more_seeds: how many seeds to add to those of the file: the numbers that follow its largest.
        of: names of the settings that have the added seeds.

    Raises:
        ConfigError: for a malformed file, a configuration that does not hold, or two runs of one name.
    """
    path = Path(path)
    file = _read(path)
    folder = Path(file.sweep.dir or f"runs/{path.stem}")
    settings = [
        setting for number, entry in enumerate(file.grid, 1) for setting in _expand(entry, f"{path}: [[grid]] {number}")
    ]
    _check_names([name for name, _ in settings], path)
    bases = [file.sweep.config] if isinstance(file.sweep.config, str) else file.sweep.config
    given = file.sweep.seeds
    added = range(max(given) + 1, max(given) + 1 + more_seeds)
    runs = []
    for seed in (*given, *added):
        for name, layer in settings:
            if seed in added and name not in of:
                continue
            own = {"run": {"seed": seed, "dir": (folder / name / f"seed-{seed}").as_posix()}}
            layers = [(f"{path}: [[grid]] {name}", layer), (str(path), own)]
            runs.append(SweepRun(name=name, seed=seed, config=load_config(bases, overrides, layers=layers)))
    return SweepPlan(
        folder=folder,
        jobs=file.sweep.jobs,
        seeds=(*given, *added),
        until=file.sweep.until,
        max_seeds=file.sweep.max_seeds,
        runs=tuple(runs),
    )


def _read(path: Path) -> SweepFile:
    document = read_toml(path)
    if "sweep" not in document and {"model", "schedule"} & document.keys():
        raise ConfigError(f'{path}: a configuration of one run; a sweep names it in [sweep] config = "{path}"')
    try:
        return SweepFile.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        what = {"missing": "is needed", "extra_forbidden": "is no key of a sweep"}.get(
            first["type"], f"- {first['msg']}"
        )
        raise ConfigError(f"{path}: {where} {what}") from error


def _expand(entry: Mapping[str, Any], where: str) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """(name, configuration layer) of every combination of one [[grid]]."""
    given = entry.get("name")
    if given is not None and (not isinstance(given, str) or not given):
        raise ConfigError(f"{where}: name must be a text")
    choices: dict[tuple[str, str], list[Any]] = {}
    for section, keys in entry.items():
        if section == "name":
            continue
        if not isinstance(keys, Mapping):
            raise ConfigError(f"{where}: {section} is no section of a training configuration; write section.key = ...")
        for key, value in keys.items():
            if (section, key) in _OWN:
                raise ConfigError(f"{where}: {section}.{key} is set by the sweep itself (seeds and dir of [sweep])")
            choices[section, key] = _alternatives(section, key, value, where)
    varied = [key for key, values in choices.items() if len(values) > 1]
    seen: list[_Setting] = []
    for values in itertools.product(*choices.values()):
        chosen = _fitting(dict(zip(choices, values, strict=True)), choices)
        if chosen in seen:
            continue
        seen.append(chosen)
        layer: dict[str, dict[str, Any]] = {}
        for (section, key), value in chosen.items():
            layer.setdefault(section, {})[key] = value
        yield _name(given, chosen, [key for key in varied if key in chosen]), layer


def _fitting(chosen: _Setting, alternatives: Mapping[tuple[str, str], Sequence[Any]]) -> _Setting:
    """Return a combination without the keys that belong to other policies (sources, ...) of the same [[grid]] only.

    `policy = ["uniform", "alphadecay"]` with `interval = [50, 100]` is three settings: uniform decay has no interval.
    """
    left_out = set()
    for section, key in chosen:
        found = section_choices().get(section)
        picked = chosen.get((section, found.selector)) if found is not None else None
        if found is None or picked is None or key == found.selector:
            continue
        owners = found.owners_of(key)
        if owners and picked not in owners and set(alternatives[section, found.selector]) & set(owners):
            left_out.add((section, key))
    return {key: value for key, value in chosen.items() if key not in left_out}


def _alternatives(section: str, key: str, value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    if _takes_list(section, key) and not all(isinstance(each, list) for each in value):
        raise ConfigError(f"{where}: {section}.{key} takes a list: write a list of lists, one for each alternative")
    if not value:
        raise ConfigError(f"{where}: {section}.{key} is an empty list of alternatives")
    return value


def _takes_list(section: str, key: str) -> bool:
    if section in section_choices():
        models: list[Any] = list(section_choices()[section].models.values())
    else:
        owner = TrainConfig.model_fields.get(section)
        models = [] if owner is None else [owner.annotation]
    fields = [getattr(model, "model_fields", {}).get(key) for model in models]
    return any(found is not None and _holds_tuple(found.annotation) for found in fields)


def _holds_tuple(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(_holds_tuple(part) for part in get_args(annotation))


def _name(given: str | None, chosen: Mapping[tuple[str, str], Any], varied: Sequence[tuple[str, str]]) -> str:
    """`policy-key-value-...`, of what varies inside the [[grid]]; safe as a folder's name."""
    policy = str(chosen.get(_POLICY, chosen.get(_RATES, "run")))
    parts = [given or policy]
    if given and _POLICY in varied:
        parts.append(policy)
    named = () if _POLICY in chosen or given else (_RATES,)
    parts += [f"{_short(key)}-{_text(chosen[key])}" for key in varied if key != _POLICY and key not in named]
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts)).lstrip(".") or "run"


def _short(key: tuple[str, str]) -> str:
    section, name = key
    return ("lr" if key == _RATES else f"lr-{name}") if section == _RATES[0] else name


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_names(names: Sequence[str], path: Path) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: two settings of the grid would be called {name!r}; give each [[grid]] a name")
