"""The two JSON files beside weights: `config.json`, and the index that maps tensors to shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from esdtool.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class WeightIndex:
    """A validated `*.index.json`."""

    weight_map: Mapping[str, str]
    """Shard of each tensor, relative to the index's folder, in the order of the index."""

    @property
    def shards(self) -> tuple[str, ...]:
        """Every shard once, sorted."""
        return tuple(sorted(set(self.weight_map.values())))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file (UTF-8, -16 or -32).

    Raises:
        CheckpointError: if the file cannot be read or is anything but a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON: not UTF-8 text at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: not valid JSON: nested too deeply") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object, but a {type(value).__name__}")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """A model's configuration; empty if the file does not exist."""
    return read_json_object(path) if path.exists() else {}


def read_index(path: Path) -> WeightIndex:
    """Read an index and check that its shards lie inside its own folder.

    Raises:
        CheckpointError: if it is no index, names no tensor, or names a path outside the folder.
    """
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: not an index of shards: no object under the key 'weight_map'")
    if not weight_map:
        raise CheckpointError(f"{path}: 'weight_map' names no tensor")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            raise CheckpointError(f"{path}: tensor {tensor!r}: the shard must be a file name, not {shard!r}")
        if leaves_folder(shard):
            raise CheckpointError(
                f"{path}: tensor {tensor!r}: refused: shard {shard!r} lies outside the checkpoint's folder"
            )
    return WeightIndex(weight_map=weight_map)


def leaves_folder(shard: str) -> bool:
    """Whether a relative path can climb out, as spelt on any platform.

    Links inside the folder may point anywhere (the Hub's cache is made of them): only the spelling counts.
    """
    return any(
        path.is_absolute() or bool(path.anchor) or ".." in path.parts
        for path in (PurePosixPath(shard), PureWindowsPath(shard))
    )
