"""Describe a checkpoint folder: its step, its configuration, and a checksum of every file.

A folder without `esdtool_checkpoint.json`, or with a file that differs from what it says there, is no whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esdtool.errors import CheckpointError
from esdtool.train.config.train_config import TrainConfig
from esdtool.train.quiet import whole_message

MANIFEST: Final = "esdtool_checkpoint.json"
STATE: Final = "trainer_state.pt"
_FORMAT: Final = "esdtool.train_checkpoint"
_VERSION: Final = 1
_STEP: Final = re.compile(r"step_(\d+)")
_LARGEST: Final = 2**24
"""Bytes of a manifest: a thousand times what one takes."""

_FileName = Annotated[str, Field(pattern=r"^[^/\\\x00]+$")]


class _Manifest(BaseModel):
    """The fields of `esdtool_checkpoint.json`."""

    model_config = ConfigDict(strict=True)

    format: Literal["esdtool.train_checkpoint"]
    version: Literal[1]
    step: Annotated[int, Field(ge=0)]
    config: dict[str, dict[str, Any]]
    files: dict[_FileName, Annotated[int, Field(ge=0)]]
    """Bytes of every file."""
    checksums: dict[_FileName, str] = {}
    """BLAKE2b of every file, 32 hexadecimal digits. Earlier versions of esdtool wrote none."""


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A whole checkpoint on the disk."""

    path: Path
    step: int
    """Updates done."""
    config: dict[str, dict[str, Any]]
    """The configuration it was made with, sections first."""


def write_manifest(folder: Path, *, step: int, config: TrainConfig) -> None:
    """Describe the files that lie in a folder, and so make a checkpoint of it."""
    files = sorted(folder.iterdir())
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "step": step,
        "config": config.model_dump(by_alias=True, mode="json"),
        "files": {file.name: file.stat().st_size for file in files},
        "checksums": {file.name: _checksum(file) for file in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(path: Path) -> SavedRun:
    """Check that a checkpoint is whole, by the sizes and the checksums of its files.

    Raises:
        CheckpointError: if it is not.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    manifest = _parse(path)
    for name, size in manifest.files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "missing" if found is None else f"truncated: {found} bytes instead of {size}"
            raise CheckpointError(f"{file}: {what}; resume from another checkpoint")
        expected = manifest.checksums.get(name)
        if expected is not None and _checksum(file) != expected:
            what = "the trainer state" if name == STATE else "it"
            raise CheckpointError(
                f"{file}: cannot read {what}: its content has changed since it was written (checksum); "
                "resume from another checkpoint"
            )
    return SavedRun(path=path, step=manifest.step, config=manifest.config)


def find_checkpoint(run: Path, resume: str) -> tuple[SavedRun | None, list[str]]:
    """Return the checkpoint to go on from, and remarks on those that were passed over.

    Args:
        run: the run directory.
        resume: `auto` for the newest whole checkpoint of `run` (None if there is none), or the path of one.

    Raises:
        CheckpointError: if the checkpoint of that path is missing, incomplete or none of esdtool's.
    """
    if resume != "auto":
        return read_manifest(Path(resume)), []
    remarks: list[str] = []
    for path in reversed(list_checkpoints(run)):
        try:
            return read_manifest(path), remarks
        except CheckpointError as error:
            remarks.append(f"passed over: {error}")
    return None, remarks


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, whole or not."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def step_folder(run: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` updates."""
    return run / "checkpoints" / f"step_{step:06d}"


def _parse(path: Path) -> _Manifest:
    file = path / MANIFEST
    try:
        if not file.is_file():
            raise FileNotFoundError
        if file.stat().st_size > _LARGEST:
            raise CheckpointError(f"{file}: cannot read: too large for a manifest")
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no {MANIFEST}, so this is no checkpoint of `esdtool train`; "
            "to go on from a bare model, set model.from"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot read: {whole_message(error)}") from error
    try:
        return _Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        if where in ("format", "version"):
            raise CheckpointError(f"{path}: a checkpoint of another format or version of esdtool") from error
        raise CheckpointError(f"{file}: cannot read: {where}: {first['msg']}") from error


def _checksum(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read: {error.strerror}") from error
