"""One file that `torch.save` wrote. Never runs code: `weights_only=True` always, and no way to turn it off."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from esdtool.checkpoint.base import TensorInfo, tensor_info
from esdtool.checkpoint.heads import read_head
from esdtool.checkpoint.other_files import refuse_other_binary
from esdtool.checkpoint.state_dict import ModelTensors, model_tensors
from esdtool.errors import CheckpointError
from esdtool.support.words import one_line

_ZIP_MAGIC = b"PK\x03\x04"
_SAFE_COPY = "re-save its state dict with torch.save(model.state_dict(), ...) or as safetensors"
_FOREIGN_GLOBAL = re.compile(r"GLOBAL (\S+)")
_CODE_SIGNS = ("reduce for unrecognized", "Can only", "not allowed", "Unsupported class")


class PickleFile:
    """A state dict on disk: mapped into memory page by page, or, in torch's oldest format, held in memory."""

    def __init__(self, path: Path, label: str) -> None:
        """Read the structure of `path`; `label` is its name within the checkpoint."""
        self._path = path
        tree, mapped = _load(path)
        found: ModelTensors[torch.Tensor] = model_tensors(tree, _is_tensor, file=str(path))
        self._values = found.tensors
        self.tensors: dict[str, TensorInfo] = {
            name: tensor_info(name, tensor, label) for name, tensor in found.tensors.items()
        }
        legacy = () if mapped else (f"{path}: torch's format from before 1.6: the whole file is held in memory",)
        self.notes: tuple[str, ...] = (*found.notes, *legacy)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One tensor, or some rows of it; its pages come from the file when they are touched."""
        tensor = self._values[name].detach()
        if tensor.is_meta:
            raise CheckpointError(f"{self._path}: tensor {name!r}: saved without data (meta device)")
        tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
        return tensor if rows is None else tensor[rows]


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _load(path: Path) -> tuple[Any, bool]:
    """(what the file holds, whether its tensors are mapped rather than read)."""
    head = read_head(path)
    refuse_other_binary(path, head)
    is_zip = head.startswith(_ZIP_MAGIC)
    if is_zip:
        _check_archive(path)
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=is_zip), is_zip
    # The parser meets arbitrary bytes here and fails in as many ways.
    except Exception as error:
        raise CheckpointError(f"{path}: {_diagnosis(error)}") from error


def _check_archive(path: Path) -> None:
    """Tell apart the kinds of zip archive that torch and others write."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: truncated: a zip archive without its directory at the end; download or copy it again"
        ) from error
    # Arbitrary bytes in the directory: bad text, sizes beyond the file, unknown versions, ...
    except Exception as error:
        raise CheckpointError(f"{path}: damaged zip archive: {one_line(error)}; download or copy it again") from error
    records = {name.partition("/")[2] for name in names}
    if "constants.pkl" in records:
        raise CheckpointError(f"{path}: refused: a TorchScript archive holds code; {_SAFE_COPY}")
    if "archive_format" in records:
        raise CheckpointError(f"{path}: refused: a torch.export archive holds a program; {_SAFE_COPY}")
    if "data.pkl" not in records:
        raise CheckpointError(f"{path}: a zip archive, but not one that torch.save wrote")


def _diagnosis(error: Exception) -> str:
    message = str(error)
    foreign = _FOREIGN_GLOBAL.search(message)
    if foreign:
        return f"refused: its pickle calls code ({foreign[1].rstrip('.,')}), which is never run; {_SAFE_COPY}"
    if any(sign in message for sign in _CODE_SIGNS):
        return f"refused: its pickle does more than hold tensors; {_SAFE_COPY}"
    # torch wraps the unpickler's own words in advice to switch the protection off.
    own = message.rpartition("WeightsUnpickler error:")[2].strip() or message
    return f"not a file that torch.save wrote, or damaged: {one_line(ValueError(own))}"
