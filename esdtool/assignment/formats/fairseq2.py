"""`fairseq2`: the `groups` of fairseq2's AdamW configuration (pull request 1332).

Patterns are regular expressions, the first group that matches counts, and values are absolute.
"""

from __future__ import annotations

from esdtool.assignment.allocation import Allocation
from esdtool.assignment.writer import (
    WriteOptions,
    Writer,
    anchored,
    collapsed,
    comment,
    needed_learning_rate,
    number,
    quoted,
)


def _write(allocation: Allocation, options: WriteOptions) -> str:
    values = {name: (entry.lr_ratio, entry.weight_decay) for name, entry in allocation.parameters.items()}
    text = [comment(options), "optimizer:\n  name: adamw\n  config:\n"]
    if options.learning_rate is not None:
        text.append(f"    lr: {number(options.learning_rate)}\n")
    if allocation.default.weight_decay is not None:
        text.append(f"    weight_decay: {number(allocation.default.weight_decay)}\n")
    text.append("    groups:\n")
    for (ratio, decay), names in collapsed(values).items():
        if ratio is None and decay is None:
            continue
        text.append(f"    - params: {quoted(anchored(names))}\n")
        if ratio is not None:
            text.append(f"      lr: {number(needed_learning_rate(options, 'fairseq2') * ratio)}\n")
        if decay is not None:
            text.append(f"      weight_decay: {number(decay)}\n")
    return "".join(text)


WRITER = Writer(carries=frozenset({"weight_decay", "lr_ratio"}), write=_write, reader="fairseq2", absolute=True)
