"""Read the weights of an analysis again, for quantities that rest on more than spectra."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from esdtool.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch

    from esdtool.analysis.document import Source
    from esdtool.analysis.module_record import ModuleResult
    from esdtool.checkpoint import Checkpoint

RowReader = Callable[["Sequence[ModuleResult]"], "Iterator[torch.Tensor]"]
"""Reads the parameter that some modules lie in, some rows at a time."""

_IN_MEMORY = "memory"
"""What an analysis names as its checkpoint where there is none."""

_BLOCK = 2**24
"""Elements that are handed on at a time."""


def row_reader(source: Source) -> RowReader:
    """Open the checkpoint of an analysis again; weights are read later, one parameter at a time.

    Raises:
        UsageError: if the weights were analysed in memory.
        CheckpointError: if it cannot be opened.
    """
    if source.checkpoint == _IN_MEMORY:
        raise UsageError(
            "the weights are to be read again, but they were analysed in memory: save the model, and analyse the file"
        )
    from esdtool.checkpoint import open_checkpoint
    from esdtool.checkpoint.adapters import merged
    from esdtool.checkpoint.hub import without_revision

    location = source.checkpoint if source.revision is None else without_revision(source.checkpoint)
    try:
        checkpoint = open_checkpoint(location, revision=source.revision, download=False)
        if source.merged_with is not None:
            checkpoint = merged(checkpoint, open_checkpoint(source.merged_with, download=False))
    except CheckpointError as error:
        raise CheckpointError(f"the weights are to be read again: {error}") from error
    return functools.partial(_rows, checkpoint)


def _rows(checkpoint: Checkpoint, modules: Sequence[ModuleResult]) -> Iterator[torch.Tensor]:
    """Yield [rows, columns] of a parameter: its first dimension, or, of stacked experts, all but the last."""
    name = modules[0].parameter
    if name not in checkpoint.tensors or checkpoint.tensors[name].shape != modules[0].stored_shape:
        raise CheckpointError(
            f"{checkpoint.location}: {name}: not the tensor that was analysed; analyse the checkpoint again"
        )
    tensor = checkpoint.read(name)
    stacked = modules[0].expert is not None and tensor.ndim > 2
    rows = tensor.flatten(0, -2) if stacked else tensor.flatten(1)
    yield from rows.split(max(1, _BLOCK // max(rows.shape[1], 1)))
