"""Checkpoints of a run: `RUN/checkpoints/step_000123`, whole or not there at all.

Each is a Hugging Face folder (config.json, safetensors, tokenizer) that transformers and
`esdtool analyze` load as it is, and beside it

- `trainer_state.pt`: optimizer state by parameter name, policy, data position, logging windows;
- `esdtool_checkpoint.json`: step, configuration, and the size of every file. Without it, or with
  a file of another size, a folder is no whole checkpoint.

A folder is written under a temporary name, synced to the disk and then renamed. The weights and the
optimizer state are gathered on rank 0, so that any number of ranks can go on from them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from esdtool.errors import CheckpointError, ConfigError, OutputError
from esdtool.support.files import default_mode, write_failures
from esdtool.support.words import dimensions
from esdtool.train.config.whole import TrainConfig
from esdtool.train.quiet import one_line, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MANIFEST: Final = "esdtool_checkpoint.json"
STATE: Final = "trainer_state.pt"
_FORMAT: Final = "esdtool.train_checkpoint"
_VERSION: Final = 1
_STEP: Final = re.compile(r"step_(\d+)")
_WHOLE: Final = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(kw_only=True)
class Snapshot:
    """A training state on the CPU of rank 0; empty on the others."""

    model: dict[str, Any]
    """Whole tensors by parameter name."""
    trainer: dict[str, Any]
    """What goes into `trainer_state.pt`."""


def take_snapshot(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], trainer: dict[str, Any]) -> Snapshot:
    """Gather everything on rank 0. All ranks must call it.

    Args:
        model: the model, sharded or not.
        optimizers: its optimizers.
        trainer: plain values to keep beside them.
    """
    weights = get_model_state_dict(model, options=_WHOLE)
    moments = get_optimizer_state_dict(model, tuple(optimizers), options=_WHOLE)
    return Snapshot(model=weights, trainer={**trainer, "optimizer": moments})


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return run / "checkpoints" / f"step_{step:06d}"


def save_checkpoint(
    run: Path,
    step: int,
    snapshot: Snapshot,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainConfig,
) -> Path:
    """Write a checkpoint and remove those that are no longer kept. For rank 0.

    Raises:
        OutputError: if it cannot be written; the earlier checkpoints are as they were.
    """
    target = step_folder(run, step)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        _make_empty(temporary)
        _save_model(temporary, snapshot.model, model=model, tokenizer=tokenizer)
        torch.save(snapshot.trainer, temporary / STATE)
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "step": step,
            "config": config.model_dump(by_alias=True, mode="json"),
            "files": {path.name: path.stat().st_size for path in sorted(temporary.iterdir())},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _rename_whole(temporary, target)
    except write_failures(RuntimeError) as error:  # which torch.save raises when the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(
            f"{target}: cannot write the checkpoint: {getattr(error, 'strerror', None) or one_line(error)}; "
            f"{_what_is_left(run)}"
        ) from error
    _prune(run, keep=config.checkpoint.keep)
    return target


def save_final(
    run: Path,
    snapshot: Snapshot,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `RUN/final`: the Hugging Face folder alone, in `dtype` or as trained. For rank 0.

    Raises:
        OutputError: if it cannot be written; an earlier one is as it was.
    """
    target = run / "final"
    temporary = run / ".final.tmp"
    try:
        _make_empty(temporary)
        _save_model(temporary, snapshot.model, model=model, tokenizer=tokenizer, dtype=dtype)
        _rename_whole(temporary, target)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(
            f"{target}: cannot write the model: {getattr(error, 'strerror', None) or one_line(error)}"
        ) from error
    return target


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A whole checkpoint on the disk."""

    path: Path
    step: int
    """Updates done."""
    config: dict[str, Any]
    """The configuration it was made with, sections first."""


def find_checkpoint(run: Path, resume: str) -> tuple[SavedRun | None, list[str]]:
    """The checkpoint to go on from, and remarks on those that were passed over.

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
    """The checkpoint folders of a run, oldest first, whole or not."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def read_manifest(path: Path) -> SavedRun:
    """Check that a checkpoint is whole, by the sizes of its files.

    Raises:
        CheckpointError: if it is not.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or manifest["version"] != _VERSION:
            raise CheckpointError(f"{path}: a checkpoint of another format or version of esdtool")
        files, step, config = dict(manifest["files"]), int(manifest["step"]), dict(manifest["config"])
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no {MANIFEST}, so this is no checkpoint of `esdtool train`; "
            "to go on from a bare model, set model.from"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: cannot read: {one_line(error)}") from error
    for name, size in files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "missing" if found is None else f"truncated: {found} bytes instead of {size}"
            raise CheckpointError(f"{file}: {what}; resume from another checkpoint")
    return SavedRun(path=path, step=step, config=config)


def load_weights(saved: SavedRun, model: PreTrainedModel) -> None:
    """Put a checkpoint's weights into a model of the same architecture, sharded or not. All ranks must call it.

    Raises:
        CheckpointError: if the weights cannot be read or are those of another model.
    """
    from transformers import AutoModelForCausalLM

    dtype = next(model.parameters()).dtype
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(saved.path, dtype=dtype)
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError
        raise CheckpointError(f"{saved.path}: cannot load the weights: {one_line(error)[:300]}") from error
    weights = loaded.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{saved.path}: a checkpoint of another model: tensor {name} is {_shape(found.get(name))} there, "
                f"but {_shape(wanted.get(name))} in [model]"
            )
    set_model_state_dict(model, weights, options=_WHOLE)


def load_trainer(saved: SavedRun, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Restore the optimizers, and return the rest of `trainer_state.pt`. All ranks must call it.

    Raises:
        CheckpointError: if the file cannot be read or belongs to other optimizers.
    """
    file = saved.path / STATE
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        moments = state.pop("optimizer")
    except Exception as error:  # RuntimeError, EOFError, UnpicklingError, KeyError, ...
        raise CheckpointError(f"{file}: cannot read the trainer state: {one_line(error)[:300]}") from error
    try:
        set_optimizer_state_dict(model, tuple(optimizers), optim_state_dict=moments, options=_WHOLE)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: the optimizer state does not fit this model: {one_line(error)[:300]}"
        ) from error
    return state


def check_same_run(saved: SavedRun, config: TrainConfig) -> list[str]:
    """Refuse to go on with another optimizer or policy; say which other settings have changed.

    Returns:
        `section.key (before then, now now)` for every other change, in order.

    Raises:
        ConfigError: if the optimizer or the policy differ: their saved states would not fit.
    """
    now = config.model_dump(by_alias=True, mode="json")
    changes = []
    for section, values in now.items():
        for key, value in values.items():
            before = saved.config.get(section, {}).get(key)
            if before == value or (section, key) in (("run", "dir"), ("checkpoint", "keep")):
                continue
            text = f"{section}.{key} ({before} then, {value} now)"
            if (section, key) in (("optimizer", "name"), ("weight_decay", "policy")):
                raise ConfigError(
                    f"cannot resume: {text} differs from {saved.path}; restore it, or begin a new run with model.from"
                )
            changes.append(text)
    return changes


def _save_model(
    folder: Path,
    weights: dict[str, Any],
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a Hugging Face folder, its floating-point weights rounded to `dtype` if one is given."""
    if dtype is not None:
        weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=dict(weights))  # it empties the dictionary
        tokenizer.save_pretrained(folder)
    if dtype is not None:
        # transformers writes the dtype of the live model, which stays as it is.
        path = folder / "config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        key = "torch_dtype" if "torch_dtype" in written else "dtype"
        path.write_text(
            json.dumps({**written, key: str(dtype).removeprefix("torch.")}, indent=2) + "\n", encoding="utf-8"
        )


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _rename_whole(temporary: Path, target: Path) -> None:
    """Bring everything to the disk, then put the folder in its place."""
    mode = default_mode(temporary)
    for path in temporary.iterdir():
        path.chmod(mode)  # safetensors makes private files
        _sync(path)
    _sync(temporary)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # folders cannot be synced there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(run: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what killed runs left."""
    for path in list_checkpoints(run)[:-keep]:
        _remove(path)
    for path in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def remove_later(run: Path, step: int) -> list[Path]:
    """Remove the checkpoints after `step`: the run goes another way from there. For rank 0."""
    later = [path for path in list_checkpoints(run) if int(path.name.removeprefix("step_")) > step]
    for path in later:
        _remove(path)
    return later


def _remove(path: Path) -> None:
    """Under another name first: a half-removed folder must not look like a checkpoint."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _what_is_left(run: Path) -> str:
    saved, _ = find_checkpoint(run, "auto")
    return f"the last whole checkpoint is {saved.path}" if saved else "there is no earlier checkpoint"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else dimensions(shape)
