"""Checkpoints of a run: `RUN/checkpoints/step_000123`, whole or not there at all.

Each is a Hugging Face folder (config.json, safetensors, tokenizer) that transformers and
`esdtool analyze` load as it is, and beside it

- `trainer_state.pt`: optimizer state by parameter name, policy, data position, logging windows;
- `esdtool_checkpoint.json`: see `esdtool.train.run.manifest`.

A folder is written under a temporary name, synced to the disk and then renamed. The weights and the
optimizer state are gathered on rank 0, so that any number of ranks can go on from them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

from esdtool.errors import CheckpointError, ConfigError, EsdtoolError, OutputError
from esdtool.support.files import default_mode
from esdtool.support.words import dimensions
from esdtool.train.config.train_config import TrainConfig
from esdtool.train.pretrained import load_model
from esdtool.train.quiet import quiet_transformers, whole_message
from esdtool.train.run.manifest import (
    STATE,
    SavedRun,
    find_checkpoint,
    list_checkpoints,
    step_folder,
    write_manifest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_OF_THE_STATE: Final = (("optimizer", "name"), ("weight_decay", "policy"), ("learning_rate", "policy"))
"""Keys on which the saved states depend."""

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
    with _whole_folder(target, what="checkpoint", on_failure=lambda: f"; {_what_is_left(run)}") as temporary:
        _save_model(temporary, snapshot.model, model=model, tokenizer=tokenizer)
        torch.save(snapshot.trainer, temporary / STATE)
        write_manifest(temporary, step=step, config=config)
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
    with _whole_folder(target, what="model") as temporary:
        _save_model(temporary, snapshot.model, model=model, tokenizer=tokenizer, dtype=dtype)
    return target


def load_weights(saved: SavedRun, model: PreTrainedModel) -> None:
    """Put a checkpoint's weights into a model of the same architecture, sharded or not. All ranks must call it.

    Raises:
        CheckpointError: if the weights cannot be read or are those of another model.
    """
    try:
        loaded, _ = load_model(saved.path, dtype=next(model.parameters()).dtype)
    except ConfigError as error:
        raise CheckpointError(f"{saved.path}: {error}") from error
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
        raise CheckpointError(f"{file}: cannot read the trainer state: {whole_message(error)[:300]}") from error
    if not isinstance(moments, dict):
        raise CheckpointError(f"{file}: cannot read the trainer state: it holds no optimizer")
    try:
        set_optimizer_state_dict(model, tuple(optimizers), optim_state_dict=moments, options=_WHOLE)
    except Exception as error:  # KeyError, ValueError, RuntimeError, AttributeError, ...
        raise CheckpointError(
            f"{file}: the optimizer state does not fit this model: {whole_message(error)[:300]}"
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
            # Earlier versions of esdtool had fewer keys, and one learning rate.
            missing = "uniform" if (section, key) == ("learning_rate", "policy") else value
            before = saved.config.get(section, {}).get(key, missing)
            if before == value or (section, key) in (("run", "dir"), ("checkpoint", "keep")):
                continue
            text = f"{section}.{key} ({before} then, {value} now)"
            if (section, key) in _OF_THE_STATE:
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


@contextmanager
def _whole_folder(target: Path, *, what: str, on_failure: Callable[[], str] = str) -> Iterator[Path]:
    """Yield an empty folder beside the target, and put it in the target's place at the end.

    If the body raises, the temporary folder is removed and the target stays as it was.

    Raises:
        OutputError: if it cannot be written; `on_failure` ends the message.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _rename_whole(temporary, target)
    except EsdtoolError:
        raise
    except Exception as error:
        # A full disk is an OSError here, a RuntimeError of torch, a SafetensorError, or a bare Exception of tokenizers.
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(
            f"{target}: cannot write the {what}: {getattr(error, 'strerror', None) or whole_message(error)[:300]}"
            f"{on_failure()}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    try:
        temporary.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
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
