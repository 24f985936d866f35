"""Moonshine's decoder: `fc1` holds the linear half first, then the one that goes through the activation."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.rules import Family, fused

FAMILY = Family(
    name="moonshine",
    model_types=frozenset({"moonshine"}),
    rules=(fused("decoder.layers.#.mlp.fc1", "up_proj", "gate_proj", layout=layouts.gate_up),),
)
