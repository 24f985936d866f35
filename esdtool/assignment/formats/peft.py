"""`peft`: keyword arguments of peft's `LoraConfig` as JSON: `LoraConfig(**json.load(file))`.

JSON has no comments, and `LoraConfig` takes no other keys, so that the command is not in it. `lora_alpha` stays twice
the rank of each module, so that the scale of the updates does not depend on the rank.
"""

from __future__ import annotations

import json
import re
from typing import Any

from esdtool.assignment.allocation import Allocation
from esdtool.assignment.writer import WriteOptions, Writer
from esdtool.errors import UsageError

_ALPHA_OVER_RANK = 2


def _write(allocation: Allocation, options: WriteOptions) -> str:
    del options
    ranks = allocation.values("rank")
    targets = allocation.values("lora_target")
    chosen = [name for name in (targets or ranks) if targets.get(name, True) and (not ranks or ranks.get(name, 0) > 0)]
    if not chosen:
        raise UsageError("peft: no module is left that would get an adapter")
    bare = next((name for name in chosen if not name.endswith(".weight")), None)
    if bare is not None:
        raise UsageError(f"peft: {bare} is a parameter without a module of its own, which LoRA patterns do not reach")
    modules = {name: name.removesuffix(".weight") for name in chosen}
    config: dict[str, Any] = {"peft_type": "LORA", "target_modules": list(modules.values())}
    if ranks:
        held = [ranks[name] for name in chosen]
        usual = max(sorted(set(held)), key=held.count)
        # peft matches (.*\\.)?(pattern)$: with the start anchored, a pattern means exactly one module.
        others = {f"^{re.escape(module)}": ranks[name] for name, module in modules.items() if ranks[name] != usual}
        config |= {
            "r": usual,
            "lora_alpha": _ALPHA_OVER_RANK * usual,
            "rank_pattern": others,
            "alpha_pattern": {pattern: _ALPHA_OVER_RANK * rank for pattern, rank in others.items()},
        }
    return json.dumps(config, indent=1) + "\n"


WRITER = Writer(carries=frozenset({"rank", "lora_target"}), write=_write, reader="peft")
