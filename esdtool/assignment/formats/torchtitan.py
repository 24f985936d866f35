"""`torchtitan`: a Python file whose `param_groups` makes the groups of torchtitan's `OptimizersContainer.Config`.

Since mixed optimizers (pull request 3269, June 2026) each `ParamGroupConfig` has a pattern, searched in names, first
match first, and the whole keyword arguments of its optimizer; a pattern that matches nothing is an error there.
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
    quoted,
    unlisted_multiplier,
)

_HEAD = '''
from torchtitan.components.optimizer import ParamGroupConfig


def param_groups(lr, weight_decay, optimizer_name="AdamW", **kwargs):
    """Make the groups on a learning rate and a base weight decay; the last one holds all other parameters."""
    return [
        ParamGroupConfig(
            pattern=pattern,
            optimizer_name=optimizer_name,
            optimizer_kwargs={**kwargs, "lr": lr * lr_ratio, "weight_decay": weight_decay * decay_ratio},
        )
        for pattern, lr_ratio, decay_ratio in GROUPS
    ]


'''


def _write(allocation: Allocation, options: WriteOptions) -> str:
    lines = [
        f"    ({quoted(anchored(names))}, {1.0 if lr is None else lr!r}, {1.0 if decay is None else decay!r}),\n"
        for (lr, decay), names in collapsed(multipliers(allocation)).items()
    ]
    rest = unlisted_multiplier(allocation)
    last = f'    (".*", 1.0, {1.0 if rest is None else rest!r}),\n'
    head = "# (pattern, learning rate over lr, weight decay over weight_decay)\n"
    return comment(options) + _HEAD.lstrip("\n") + head + "GROUPS = [\n" + "".join(lines) + last + "]\n"


WRITER = Writer(carries=frozenset({"weight_decay", "lr_ratio"}), write=_write, reader="torchtitan")
