"""Find the checkpoints of a run as they land: whole ones only, in the order of training."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from esdtool.checkpoint.formats import weight_suffixes
from esdtool.checkpoint.layout import INDEX_SUFFIX
from esdtool.comparison.trajectory import in_order_of_training, step_of

_SHARD: Final = re.compile(r"^(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)$")
_UNFINISHED: Final = re.compile(r"^\.|(^|[-_.])(tmp|temp|partial|incomplete)([-_.]|$)", re.IGNORECASE)
"""Names under which trainers write what is not whole yet: `tmp-checkpoint-500`, `.step_000500.x`, `model.pt.tmp`."""


@dataclass(frozen=True, kw_only=True)
class Landing:
    """One checkpoint as it lies on the disk."""

    path: str
    signature: str
    """Identifies the state of its files: another one is another checkpoint."""
    changed: float
    """When one of its files was last written, in seconds since the epoch."""
    has_all_shards: bool
    """Whether no file of a numbered set is missing."""

    def is_quiet(self, seconds: float) -> bool:
        """Tell whether nobody has written to it for so long."""
        return time.time() - self.changed >= seconds


def landings(source: str) -> list[Landing]:
    """List the checkpoints of a run or of a pattern that are there now, in the order of training.

    Args:
        source: a folder whose folders or files, at most two levels down, are checkpoints with a number in their names;
            or a pattern such as `run/step_*`. It need not exist yet. `final`, a copy of the last state, is left out.
    """
    paths = list(_in_folder(Path(source))) if Path(source).is_dir() else sorted(glob.glob(source))  # noqa: PTH207 - a whole pattern
    found = {path: landing for path in map(str, paths) if (landing := _landing(Path(path))) is not None}
    return [found[path] for path in in_order_of_training(list(found))]


def is_one_checkpoint(source: str) -> bool:
    """Tell whether a folder holds the files of a checkpoint itself."""
    path = Path(source)
    return path.is_dir() and (path / "config.json").is_file() and _landing(path) is not None


def _in_folder(folder: Path, *, depth: int = 2) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if _UNFINISHED.search(path.name):
            continue
        numbered = step_of(path.name) is not None and not _SHARD.match(path.name)
        if numbered and _landing(path) is not None:
            yield path
        elif path.is_dir() and depth > 1:
            yield from _in_folder(path, depth=depth - 1)


def _landing(path: Path) -> Landing | None:
    """Look at what may be a checkpoint; None for anything else, and for what is being removed."""
    if _UNFINISHED.search(path.name):
        return None
    suffixes = (*weight_suffixes(), ".distcp", INDEX_SUFFIX)
    try:
        files = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
        weights = [file for file in files if file.name.endswith(suffixes)]
        # An optimizer's state alone is no checkpoint, and `trainer_state.pt` beside weights is none of its own.
        weights = [file for file in weights if not file.name.startswith(("optimizer", "scheduler", "rng_state"))]
        if not weights or any(_UNFINISHED.search(file.name) for file in files):
            return None
        states = [(file.name, status.st_size, status.st_mtime_ns) for file in files for status in [file.stat()]]
    except OSError:
        return None
    return Landing(
        path=str(path),
        signature=hashlib.sha256(repr((os.path.realpath(path), states)).encode()).hexdigest(),
        changed=max(state[2] for state in states) / 1e9,
        has_all_shards=_has_all([file.name for file in weights]),
    )


def _has_all(names: list[str]) -> bool:
    """Tell whether sets such as `model-00001-of-00003.safetensors` are whole."""
    numbers: dict[tuple[str, str, int], set[int]] = {}
    for name in names:
        shard = _SHARD.match(name)
        if shard:
            key = shard["stem"], shard["suffix"], int(shard["count"])
            numbers.setdefault(key, set()).add(int(shard["number"]))
    return all(len(held) >= count for (_, _, count), held in numbers.items())
