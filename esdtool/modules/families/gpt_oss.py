"""The family `gpt-oss`: gate and up of the experts are on alternate columns."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.rules import Family, stacked

FAMILY = Family(
    name="gpt_oss",
    model_types=frozenset({"gpt_oss"}),
    marker="self_attn.sinks",
    rules=(stacked("experts.gate_up_proj", "gate_proj", "up_proj", layout=layouts.alternating),),
)
