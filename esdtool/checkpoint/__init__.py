"""Readers: a path, a Hub id or a live model as a catalogue of lazy tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.errors import CheckpointError, UsageError
from esdtool.support.words import visible

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint", "from_state_dict", "from_model"]


def open_checkpoint(location: str | Path, *, revision: str | None = None, download: bool | None = None) -> Checkpoint:
    """Open a checkpoint; only headers are read.

    In this order: a URL (`hf://`, `s3://`, `https://`, ...; extra `remote`), an existing folder, an existing file, a
    Hub id `org/name[@revision]` (extra `hub`). So a path that exists is never taken for a Hub id.

    Args:
        location: a .safetensors file; a .bin, .pt, .pth, .pth.tar or .ckpt file of torch.save (never
            runs code); an .index.json; a Hugging Face or torch.distributed.checkpoint folder; or a Hub id.
        revision: branch, tag or commit; for a Hub id only.
        download: True downloads a model of the Hub, False reads of it what is needed, when it is needed. None: one of
            less than 1 GB is downloaded.

    Raises:
        CheckpointError: if there is nothing to read, or it is broken or unsafe; the message names the file.
        MissingExtraError: for a Hub id without `huggingface_hub`, or a URL without the packages for it.
        UsageError: if `revision` is given with a path, or twice.
    """
    from esdtool.checkpoint.hub import open_hub, parse_hub_id, parse_hub_url
    from esdtool.checkpoint.local import open_directory, open_file
    from esdtool.checkpoint.opening import is_url, open_url

    text = visible(os.fspath(location))
    if text.startswith("file://"):
        text = location = url2pathname(unquote(urlsplit(text).path))
    if is_url(text):
        on_hub = parse_hub_url(text, revision)
        if on_hub is not None:
            return _logical(open_hub(on_hub, location=text, download=download))
        return _logical(open_url(text, revision=revision))
    path = Path(location).expanduser()
    try:
        exists = path.exists()
    except OSError as error:
        raise CheckpointError(f"{text}: cannot read: {error.strerror}") from error
    except ValueError as error:  # a zero byte, or half of a surrogate pair
        raise CheckpointError(f"{text}: not a valid file name") from error
    if exists:
        if revision is not None:
            raise UsageError(f"{text}: a path has no revision {revision!r}; that is for Hub ids")
        if path.is_dir():
            return _logical(open_directory(path))
        if not path.is_file():
            raise CheckpointError(f"{text}: neither a file nor a folder")
        return _logical(open_file(path))
    if path.is_symlink():
        raise CheckpointError(f"{text}: a link to {str(path.readlink())!r}, which does not exist")
    hub_id = parse_hub_id(text, revision)
    if hub_id is None:
        raise CheckpointError(f"{text}: no such file or directory")
    return _logical(open_hub(hub_id, location=text, download=download))


def _logical(stored: Checkpoint) -> Checkpoint:
    """Return the weights that a checkpoint stands for, where it stores codes and scales, parts, or factors."""
    # Names of files need not be text, but all that is said of a checkpoint is written down.
    stored = replace(stored, location=visible(stored.location), notes=tuple(map(visible, stored.notes)))
    from esdtool.checkpoint.adapters import adapter_weights
    from esdtool.checkpoint.other_files import refuse_other_tensors
    from esdtool.checkpoint.parametrized import applied_weights
    from esdtool.checkpoint.quantized.wrapper import dequantized

    refuse_other_tensors(stored)
    return adapter_weights(applied_weights(dequantized(stored)))


def from_state_dict(
    mapping: Mapping[str, Any], *, config: Mapping[str, Any] | None = None, location: str = "memory"
) -> Checkpoint:
    """Return a state dict in memory as a checkpoint; see `esdtool.checkpoint.memory.from_state_dict`."""
    from esdtool.checkpoint.memory import from_state_dict as implementation

    return _logical(implementation(mapping, config=config, location=location))


def from_model(model: nn.Module) -> Checkpoint:
    """Return a live model as a checkpoint; see `esdtool.checkpoint.memory.from_model`."""
    from esdtool.checkpoint.memory import from_model as implementation

    return _logical(implementation(model))
