"""The JSON files beside weights: `config.json`, and the index that maps tensors to shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from esdtool.checkpoint.boundary import one_line_errors
from esdtool.checkpoint.limits import JSON_BYTES, SHARDS, check_names, is_text, shortened
from esdtool.checkpoint.quantized.settings import first_problem, read_settings
from esdtool.checkpoint.stored_file import Place, StoredFile, is_there
from esdtool.errors import CheckpointError
from esdtool.support.words import visible

_LARGEST = 2**31

Model = TypeVar("Model", bound=BaseModel)


class WeightIndex(BaseModel):
    """A `*.index.json`."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    weight_map: Annotated[dict[str, Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    """Shard of each tensor, relative to the index's folder, in the order of the index."""

    @property
    def shards(self) -> tuple[str, ...]:
        """Every shard once, sorted."""
        return tuple(sorted(set(self.weight_map.values())))


def _size(value: Any) -> Any:
    """Return a size of a model: a whole number, or a list of one for each layer; null where it does not apply."""
    if value is None or isinstance(value, list):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST < value < _LARGEST or value % 1:
        raise ValueError(f"not a whole number below {_LARGEST}")
    return value


_Size = Annotated[Any, BeforeValidator(_size)]


class ModelConfig(BaseModel):
    """The keys of a `config.json` that esdtool reads, by the names that most models use. Other keys are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model_type: str | None = None
    hidden_size: _Size = None
    intermediate_size: _Size = None
    num_hidden_layers: _Size = None
    num_attention_heads: _Size = None
    num_key_value_heads: _Size = None
    head_dim: _Size = None
    vocab_size: _Size = None


def read_json_object(path: Place) -> dict[str, Any]:
    """Read the JSON object in a file (UTF-8, -16 or -32).

    Raises:
        CheckpointError: if the file cannot be read, is too long, or is anything but a JSON object.
    """
    shown = visible(str(path))
    with one_line_errors(path):
        text = StoredFile.at(path).read_all(JSON_BYTES)
        try:
            value = json.loads(text)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{shown}: not valid JSON: not UTF-8 text at byte {error.start}") from error
        except json.JSONDecodeError as error:
            raise CheckpointError(
                f"{shown}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
            ) from error
        except RecursionError as error:
            raise CheckpointError(f"{shown}: not valid JSON: nested too deeply") from error
        except ValueError as error:  # a number of thousands of digits
            raise CheckpointError(f"{shown}: not valid JSON: a number that is too long") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{shown}: not a JSON object, but a {type(value).__name__}")
    # Only an escape can spell half of a pair, and then it cannot be written again.
    if b"\\" in text and not is_text(json.dumps(value, ensure_ascii=False)):
        raise CheckpointError(f"{shown}: not valid JSON: half of a surrogate pair in a text")
    return value


def read_config(path: Place) -> dict[str, Any]:
    """Read a model's configuration; an empty one if the file does not exist.

    Raises:
        CheckpointError: if it cannot be read, or a value that is looked at is of a wrong type.
    """
    if not is_there(path):
        return {}
    config = read_json_object(path)
    shown = visible(str(path))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        validated(ModelConfig, part, shown)
    read_settings(config, file=shown)
    return config


def read_index(path: Place) -> WeightIndex:
    """Read an index and check that its shards lie inside its own folder.

    Raises:
        CheckpointError: if it is no index, names no tensor, or names a path outside the folder.
    """
    shown = visible(str(path))
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{shown}: not an index of shards: no object under the key 'weight_map'")
    if not weight_map:
        raise CheckpointError(f"{shown}: 'weight_map' names no tensor")
    check_names(shown, weight_map)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            value = shortened(repr(shard) if isinstance(shard, int | float | str | None) else type(shard).__name__)
            raise CheckpointError(f"{shown}: tensor {tensor!r}: the shard must be a file name, not {value}")
        if leaves_folder(shard):
            raise CheckpointError(
                f"{shown}: tensor {tensor!r}: refused: shard {shard!r} lies outside the checkpoint's folder"
            )
    index = WeightIndex(weight_map=weight_map)
    if len(index.shards) > SHARDS:
        raise CheckpointError(f"{shown}: refused: {len(index.shards)} shards, more than {SHARDS}")
    return index


def validated(model: type[Model], value: Mapping[str, Any], where: str) -> Model:
    """Check the types of a JSON object.

    Raises:
        CheckpointError: naming the first key with a wrong value.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {first_problem(error)}") from error


def leaves_folder(shard: str) -> bool:
    """Return whether a relative path can climb out, as spelt on any platform.

    Links inside the folder may point anywhere (the Hub's cache is made of them): only the spelling counts.
    """
    return any(
        path.is_absolute() or bool(path.anchor) or ".." in path.parts
        for path in (PurePosixPath(shard), PureWindowsPath(shard))
    )
