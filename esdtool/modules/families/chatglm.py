"""ChatGLM: `query_key_value` contiguous since the second version."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.rules import Family, fused

FAMILY = Family(
    name="chatglm",
    model_types=frozenset({"chatglm"}),
    rules=(fused("query_key_value", "q_proj", "k_proj", "v_proj", layout=layouts.chatglm),),
)
