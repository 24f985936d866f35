"""Training configurations as files: TOML in, a validated `TrainConfig` out, and back.

Several files are layered: keys of later ones replace those of earlier ones, and
`--set section.key=value` comes last. Every complaint is one line that names the key,
its value and where it came from.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from esdtool.errors import ConfigError, MissingExtraError
from esdtool.train.config.sections import (
    BatchSettings,
    CheckpointSettings,
    DataSettings,
    EvalSettings,
    LoggingSettings,
    ModelSettings,
    OptimizerSettings,
    PrecisionSettings,
    RunSettings,
    ScheduleSettings,
    TokenizerSettings,
    WeightDecaySettings,
)
from esdtool.train.config.whole import TrainConfig

__all__ = [
    "BatchSettings",
    "CheckpointSettings",
    "DataSettings",
    "EvalSettings",
    "LoggingSettings",
    "ModelSettings",
    "OptimizerSettings",
    "PrecisionSettings",
    "RunSettings",
    "ScheduleSettings",
    "TokenizerSettings",
    "TrainConfig",
    "WeightDecaySettings",
    "check_batch",
    "config_from_mapping",
    "json_schema",
    "load_config",
    "to_toml",
]

# Keys of which a later file or --set replaces all: choosing another model drops the earlier choice.
_ALTERNATIVES: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "model": (("preset", "config", "from"),),
    "tokenizer": (("name", "file", "train_vocab_size"),),
    "data": (("validation_fraction", "validation_files", "validation_split"),),
}
# Keys that belong to one value of a selector: choosing another value later drops them.
_BELONGS: Final[dict[tuple[str, str], dict[str, tuple[str, ...]]]] = {
    ("data", "source"): {
        "files": ("files", "validation_files"),
        "huggingface": ("dataset", "name", "revision", "validation_split"),
    },
    ("optimizer", "name"): {"muon": ("muon_lr", "muon_momentum")},
    ("schedule", "name"): {"wsd": ("decay_steps",)},
    ("weight_decay", "policy"): {"file": ("path",), "alphadecay": ("delay",)},
}


def load_config(
    path: str | Path | Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    layers: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> TrainConfig:
    """Read one TOML file, or several in layers, apply the overrides, and resolve the defaults.

    Paths inside the files are relative to the working directory, as on the command line.

    Args:
        path: the file, or several: keys of later ones replace those of earlier ones.
        overrides: `section.key=value` each, as after `--set`; the value is TOML, or else a bare string.
        layers: (where it came from, sections) each, over all of that.

    Raises:
        ConfigError: for a missing or malformed file, an unknown key, a wrong type or an impossible combination.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path]
    all_layers: list[tuple[str, Mapping[str, Any]]] = [(str(each), read_toml(each)) for each in paths]
    all_layers += [(f"--set {override}", _parse_override(override)) for override in overrides]
    all_layers += layers
    document: dict[str, Any] = {}
    origins: dict[tuple[str, ...], str] = {}
    for origin, layer in all_layers:
        _merge(document, layer, origin, origins)
    default_dir = "runs/" + ("-".join(each.stem for each in paths) or "run")
    if isinstance(run := document.setdefault("run", {}), dict):
        run.setdefault("dir", default_dir)
    return _validate(document, origins, where=" + ".join(str(each) for each in paths))


def config_from_mapping(document: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """A resolved configuration from nested dictionaries, sections first; `where` begins the error messages.

    >>> config_from_mapping({"model": {"preset": "llama-1m"}, "schedule": {"steps": 20},
    ...                      "tokenizer": {"train_vocab_size": 512}}).warmup_steps
    2

    Raises:
        ConfigError: for an unknown key, a wrong type or an impossible combination.
    """
    return _validate(document, {}, where=where)


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Refuse a global batch that cannot be split evenly over the ranks.

    Raises:
        ConfigError: if batch.global_size is not a multiple of batch.micro_size times `world_size`.
    """
    batch = config.batch
    if batch.global_size % (batch.micro_size * world_size):
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        raise ConfigError(
            f"batch.global_size {batch.global_size} is not divisible by batch.micro_size {batch.micro_size} x {ranks}"
        )


def to_toml(config: TrainConfig) -> str:
    """The configuration as TOML, every key that has a value written out; `load_config` reads it back unchanged."""
    try:
        import tomli_w
    except ImportError as error:
        raise MissingExtraError("writing TOML", "train") from error
    return tomli_w.dumps(config.model_dump(by_alias=True, exclude_none=True))


def json_schema() -> dict[str, Any]:
    """JSON Schema of the configuration file, with the documentation of each key."""
    return TrainConfig.model_json_schema(by_alias=True)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: if it cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: not UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _parse_override(override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set {override}: expected section.key=value, e.g. --set optimizer.lr=3e-4")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    # A text with a line break could define more than one key: it is no value, then.
    value = parsed["value"] if list(parsed) == ["value"] else text.strip()
    return {section: {key: value}}


def _merge(
    document: dict[str, Any], layer: Mapping[str, Any], origin: str, origins: dict[tuple[str, ...], str]
) -> None:
    for section, values in layer.items():
        origins[(section,)] = origin
        if not isinstance(values, Mapping) or not isinstance(document.get(section, {}), dict):
            document[section] = values
            continue
        table = document.setdefault(section, {})
        for key in _replaced_by(section, values):
            table.pop(key, None)
        for key, value in values.items():
            table[key] = value
            origins[(section, key)] = origin


def _replaced_by(section: str, values: Mapping[str, Any]) -> set[str]:
    """Keys of earlier layers that make no sense beside `values`."""
    replaced: set[str] = set()
    for group in _ALTERNATIVES.get(section, ()):
        if any(key in values for key in group):
            replaced.update(group)
    for (owner, selector), belongs in _BELONGS.items():
        if owner == section and selector in values:
            for choice, keys in belongs.items():
                if choice != values[selector]:
                    replaced.update(keys)
    return replaced


def _validate(document: Mapping[str, Any], origins: Mapping[tuple[str, ...], str], where: str) -> TrainConfig:
    try:
        return TrainConfig.model_validate(dict(document)).resolved()
    except ValidationError as error:
        raise ConfigError(_first_complaint(error, origins, where)) from error


def _first_complaint(error: ValidationError, origins: Mapping[tuple[str, ...], str], where: str) -> str:
    """One line. A misspelt key comes first: it explains the missing one."""
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")[0]
    location = tuple(str(part) for part in details["loc"])
    origin = origins.get(location[:2]) or origins.get(location[:1]) or where
    if details["type"] == "value_error":
        # Raised by a section's own check, which names its keys.
        return f"{where}: {details['ctx']['error']}"
    return f"{origin}: {_complaint(location, details)}"


def _complaint(location: tuple[str, ...], details: ErrorDetails) -> str:
    name = ".".join(location)
    value = details["input"]
    match details["type"]:
        case "extra_forbidden":
            return _unknown_key(location)
        case "missing":
            return f"{name} is needed" if len(location) > 1 else f"the section [{name}] is needed"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"{name} must be a section [{name}], not {_shown(value)}"
        case _:
            wish = details["msg"].removeprefix("Input should be ")
            return f"{name} is {_shown(value)}, but should be {wish}"


def _unknown_key(location: tuple[str, ...]) -> str:
    owner: type[BaseModel] = TrainConfig
    for part in location[:-1]:
        annotation = owner.model_fields[part].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        owner = annotation
    known = [field.alias or name for name, field in owner.model_fields.items()]
    if len(location) == 1:
        close = difflib.get_close_matches(location[0], known, n=1)
        sections = ", ".join(f"[{name}]" for name in known)
        return f"unknown section [{location[0]}]; " + (
            f"did you mean [{close[0]}]?" if close else f"there are {sections}"
        )
    close = difflib.get_close_matches(location[-1], known, n=1)
    section = ".".join(location[:-1])
    hint = f"did you mean {section}.{close[0]}?" if close else f"the keys of [{section}] are {', '.join(known)}"
    return f"unknown key {'.'.join(location)}; {hint}"


def _shown(value: object) -> str:
    """A value as TOML spells it, with its type where that is the point."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'the string "{value}"'
    if isinstance(value, dict):
        return "a table"
    return str(value)
