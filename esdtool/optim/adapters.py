"""Find adapters that are trained on a frozen model, and compute their updates from the parameters that are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from esdtool.checkpoint.adapters.checkpoint import AdapterCheckpoint, adapter_weights
from esdtool.checkpoint.memory import MemoryCheckpoint
from esdtool.modules import WeightModule
from esdtool.modules.reading import read_matrices
from esdtool.optim.live_scores import Operands
from esdtool.optim.parameters import LiveModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapters:
    """The updates of a model's adapters as functions of the parameters that are trained."""

    checkpoint: AdapterCheckpoint
    """Updates by the name of the weight that they are added to."""
    stored: Mapping[str, tuple[str, ...]]
    """Names of the trained parameters of each update, by the update's name."""
    factors: Mapping[nn.Parameter, tuple[nn.Parameter, ...]]
    """All trained parameters of an update, by the first of them."""

    def matrices(self, module: WeightModule, operands: Operands) -> list[torch.Tensor]:
        """Compute an update's matrices from its factors; those of low rank as small ones with the same spectrum."""
        values = dict(zip(self.stored[module.parameter], operands, strict=True))
        inner = self.checkpoint.inner
        assert isinstance(inner, MemoryCheckpoint)
        return read_matrices(replace(self.checkpoint, inner=replace(inner, values=values)), module)


def trained_adapters(live: LiveModel) -> Adapters | None:
    """Find the adapters of a model whose base is frozen; None for any other model.

    Raises:
        CheckpointError: if the model trains adapters whose updates cannot be computed.
    """
    checkpoint = live.checkpoint
    assert isinstance(checkpoint, MemoryCheckpoint)
    trained = {name: value for name, value in live.parameters.items() if value.requires_grad}
    if not trained or len(trained) == len(live.parameters):
        return None
    found = adapter_weights(
        replace(
            checkpoint,
            tensors={name: info for name, info in checkpoint.tensors.items() if name in trained},
            values=trained,
        )
    )
    if not isinstance(found, AdapterCheckpoint):
        return None
    stored = {name: tensor.stored for name, tensor in found.derived.items()}
    factors = {}
    for names in stored.values():
        parameters = tuple(live.parameters[name] for name in names)
        factors[parameters[0]] = parameters
    return Adapters(checkpoint=found, stored=stored, factors=factors)
