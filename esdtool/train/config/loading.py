"""Training configurations as files: TOML in, a validated `TrainConfig` out, and back.

Several files are layered: keys of later ones replace those of earlier ones, and `--set section.key=value` comes last.
Every complaint is one line that names the key, its value and where it came from.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from esdtool.errors import ConfigError, MissingExtraError
from esdtool.train.config.complaints import first_complaint
from esdtool.train.config.layers import Layers
from esdtool.train.config.train_config import TrainConfig

__all__ = [
    "TrainConfig",
    "check_batch",
    "config_from_mapping",
    "json_schema",
    "load_config",
    "load_run_config",
    "read_toml",
    "to_toml",
]


def load_config(
    path: str | Path | Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    layers: Sequence[tuple[str, Mapping[str, Any]]] = (),
    on_note: Callable[[str], None] | None = None,
) -> TrainConfig:
    """Read one TOML file, or several in layers, apply the overrides, and resolve the defaults.

    Paths inside the files are relative to the working directory, as on the command line. A later layer may choose
    another policy, source, optimizer or schedule: then the keys that earlier layers gave for the earlier choice are
    dropped. A key of another choice than the last one is refused wherever else it stands.

    Args:
        path: the file, or several: keys of later ones replace those of earlier ones.
        overrides: `section.key=value` each, as after `--set`; the value is TOML, or else a bare string. Together they
            are one layer.
        layers: (where it came from, sections) each, over all of that.
        on_note: is told which keys were dropped, one line for each section.

    Raises:
        ConfigError: for a missing or malformed file, an unknown key, a wrong type or an impossible combination.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path]
    found = Layers()
    for each in paths:
        found.add([(str(each), read_toml(each))])
    found.add([(f"--set {override}", _parse_override(override)) for override in overrides])
    for layer in layers:
        found.add([layer])
    if on_note is not None:
        for note in found.notes:
            on_note(note)
    default_dir = "runs/" + ("-".join(each.stem for each in paths) or "run")
    if isinstance(run := found.document.setdefault("run", {}), dict):
        run.setdefault("dir", default_dir)
    return _validate(found, where=" + ".join(str(each) for each in paths))


def load_run_config(path: str | Path) -> TrainConfig:
    """Read the config.toml that a run wrote into its directory.

    Earlier versions of esdtool wrote the keys of all policies, sources and optimizers there; those of others than the
    run's own are left out.

    Raises:
        ConfigError: as `load_config` raises it.
    """
    found = Layers()
    found.add([(str(path), read_toml(Path(path)))])
    found.drop_foreign()
    return _validate(found, where=str(path))


def config_from_mapping(document: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """Make a resolved configuration of nested dictionaries, sections first; `where` begins the error messages.

    >>> config_from_mapping({"model": {"preset": "llama-1m"}, "schedule": {"steps": 20},
    ...                      "tokenizer": {"train_vocab_size": 512}}).warmup_steps
    2

    Raises:
        ConfigError: for an unknown key, a wrong type or an impossible combination.
    """
    return _validate(Layers(document=dict(document)), where=where)


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
    """Write the configuration as TOML with every key that has a value; `load_config` reads it back unchanged."""
    try:
        import tomli_w
    except ImportError as error:
        raise MissingExtraError("writing TOML", "train") from error
    return tomli_w.dumps(config.model_dump(by_alias=True, exclude_none=True))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the configuration file, with the documentation of each key."""
    return TrainConfig.model_json_schema(by_alias=True)


def read_toml(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file.

    Raises:
        ConfigError: if it cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: not UTF-8 text") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid TOML: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _parse_override(override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set {override}: expected section.key=value, e.g. --set optimizer.lr=3e-4")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {}
    # A text with a line break could define more than one key: it is no value, then.
    value = parsed["value"] if list(parsed) == ["value"] else text.strip()
    return {section: {key: value}}


def _validate(found: Layers, where: str) -> TrainConfig:
    try:
        return TrainConfig.model_validate(found.document).resolved()
    except ValidationError as error:
        raise ConfigError(first_complaint(error, found, where)) from error
