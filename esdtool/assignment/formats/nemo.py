"""`nemo`: `param_group_overrides` of NeMo Automodel's optimizer (pull request 3046, July 2026).

Patterns are searched in parameter names, the first that matches counts, and `lr_mult` and `wd_mult` multiply what the
scheduler says.
"""

from __future__ import annotations

from esdtool.assignment.allocation import Allocation
from esdtool.assignment.writer import (
    WriteOptions,
    Writer,
    anchored,
    collapsed,
    comment,
    multipliers,
    number,
    quoted,
    unlisted_multiplier,
)


def _write(allocation: Allocation, options: WriteOptions) -> str:
    text = [comment(options), "param_group_overrides:\n"]
    for (lr, decay), names in collapsed(multipliers(allocation)).items():
        text.append(f"  - pattern: {quoted(anchored(names))}\n")
        text.append(f"    lr_mult: {number(1.0 if lr is None else lr)}\n")
        text.append(f"    wd_mult: {number(1.0 if decay is None else decay)}\n")
    rest = unlisted_multiplier(allocation)
    if rest is not None:
        text.append(f'  - pattern: ".*"\n    lr_mult: 1.0\n    wd_mult: {number(rest)}\n')
    return "".join(text)


WRITER = Writer(carries=frozenset({"weight_decay", "lr_ratio"}), write=_write, reader="NeMo Automodel")
