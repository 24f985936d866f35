"""CodeGen: `qkv_proj` in four groups, and the values before the keys."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.rules import Family, fused

FAMILY = Family(
    name="codegen",
    model_types=frozenset({"codegen"}),
    rules=(fused("qkv_proj", "q_proj", "v_proj", "k_proj", layout=layouts.codegen),),
)
