"""A live model or a state dict as a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from esdtool.checkpoint.base import Checkpoint, tensor_info
from esdtool.checkpoint.limits import check_names
from esdtool.checkpoint.state_dict import ModelTensors, model_tensors
from esdtool.errors import CheckpointError
from esdtool.names import WRAPPERS, canonical_name


@dataclass(kw_only=True)
class MemoryCheckpoint(Checkpoint):
    """Tensors that live elsewhere; what is read is their value at that time."""

    values: Mapping[str, torch.Tensor] = field(repr=False)
    model: nn.Module | None = field(default=None, repr=False)
    """The live model whose tensors these are."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU; shared memory if it is there already.

        A DTensor is gathered, which is a collective: all ranks must then read the same names in the same order.
        """
        self.info(name)
        tensor = self.values[name].detach()
        if tensor.is_meta:
            raise CheckpointError(f"{self.location}: tensor {name!r}: no data (meta device); load the weights first")
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        return tensor


def from_state_dict(
    mapping: Mapping[str, Any], *, config: Mapping[str, Any] | None = None, location: str = "memory"
) -> Checkpoint:
    """A state dict, bare or as a trainer nests it, as a checkpoint. Names stay as they are.

    >>> from_state_dict({"fc.weight": torch.zeros(3, 2)}).tensors["fc.weight"].shape
    (3, 2)

    Args:
        mapping: tensor by name; nested mappings as in a saved file.
        config: what `config.json` would hold.
        location: name for messages and reports.

    Raises:
        CheckpointError: if it holds no tensors.
    """
    found: ModelTensors[torch.Tensor] = model_tensors(
        mapping, lambda value: isinstance(value, torch.Tensor), file=location
    )
    return _checkpoint(found.tensors, config=config or {}, location=location, notes=found.notes)


def from_model(model: nn.Module) -> Checkpoint:
    """A live model's parameters and persistent buffers as a checkpoint. Nothing is copied before it is read.

    Names are those of `model.state_dict()` without the segments of wrappers (DataParallel,
    torch.compile, FSDP, activation checkpointing). Tied parameters appear under each of their names.

    Raises:
        CheckpointError: if there are no parameters, or this rank holds only a shard that cannot be gathered
            one by one (FSDP1, DeepSpeed ZeRO-3).
    """
    tensors = dict(_named_tensors(model))
    if not tensors:
        raise CheckpointError(f"memory: {type(model).__name__} has no parameters")
    for name, tensor in tensors.items():
        _check_whole(name, tensor)
    stripped = {canonical_name(name): tensor for name, tensor in tensors.items()}
    # A model may have a submodule that is really called `module`; distinct names come first.
    names_are_distinct = len(stripped) == len(tensors)
    return _checkpoint(
        stripped if names_are_distinct else tensors,
        config=_config(model),
        adapter_config=_adapter_config(model),
        location="memory",
        notes=(),
        model=model,
    )


def _checkpoint(
    tensors: Mapping[str, torch.Tensor],
    *,
    config: Mapping[str, Any],
    location: str,
    notes: tuple[str, ...],
    adapter_config: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
) -> Checkpoint:
    check_names(location, tensors)
    return MemoryCheckpoint(
        location=location,
        tensors={name: tensor_info(name, tensor, "") for name, tensor in tensors.items()},
        config=config,
        adapter_config=adapter_config or {},
        notes=notes,
        collective_reads=any(hasattr(tensor, "full_tensor") for tensor in tensors.values()),
        values=tensors,
        model=model,
    )


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, module by module, in the order of `state_dict()`.

    `state_dict()` itself would gather a sharded model whole.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield dot + name, parameter
        transient: set[str] = getattr(module, "_non_persistent_buffers_set", set())
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in transient:
                yield dot + name, buffer


def _check_whole(name: str, tensor: torch.Tensor) -> None:
    if name.rpartition(".")[2] == "_flat_param":
        raise CheckpointError(
            f"memory: {name}: FSDP1 keeps parameters flattened; analyse inside "
            "FullyShardedDataParallel.summon_full_params, or shard with fully_shard"
        )
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        raise CheckpointError(f"memory: {name}: sharded by DeepSpeed ZeRO-3; gather the parameters first")


def _config(model: nn.Module) -> dict[str, Any]:
    """`model.config`, as transformers keeps it, of the model or of what its wrappers wrap."""
    inner: object = model
    while isinstance(inner, nn.Module):
        config: Any = getattr(inner, "config", None)
        if callable(getattr(config, "to_dict", None)):
            config = config.to_dict()
        if isinstance(config, Mapping):
            return dict(config)
        inner = next((wrapped for name in WRAPPERS if (wrapped := inner._modules.get(name)) is not None), None)
    return {}


def _adapter_config(model: nn.Module) -> dict[str, Any]:
    """PEFT's configuration of a live model's adapter, where it has exactly one, with plain values as in a file."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, Mapping) and len(configs) == 1:
            (config,) = configs.values()
            if callable(getattr(config, "to_dict", None)):
                return {key: _plain(value) for key, value in config.to_dict().items()}
    return {}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset | tuple):
        return sorted(value, key=str)
    return dict(vars(value)) if hasattr(value, "__dict__") else value
