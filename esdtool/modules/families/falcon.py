"""Falcon: three layouts of `query_key_value`."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.rules import Family, fused

FAMILY = Family(
    name="falcon",
    model_types=frozenset({"falcon", "RefinedWeb", "RefinedWebModel"}),
    rules=(fused("query_key_value", "q_proj", "k_proj", "v_proj", layout=layouts.falcon),),
)
