"""`torch-groups`: parameter groups as JSON, equal values together, for code that builds its optimizer itself."""

from __future__ import annotations

import json

from esdtool.assignment.allocation import Allocation
from esdtool.assignment.writer import WriteOptions, Writer, collapsed
from esdtool.support.json_text import escaped


def _write(allocation: Allocation, options: WriteOptions) -> str:
    """Write a list of {"weight_decay": x, "lr_ratio": y, "params": [names]}; the command has no place in it."""
    del options
    unlisted = allocation.default.weight_decay
    values = {
        name: (unlisted if entry.weight_decay is None else entry.weight_decay, entry.lr_ratio)
        for name, entry in allocation.parameters.items()
        if entry.weight_decay is not None or entry.lr_ratio is not None
    }
    groups = []
    for (decay, ratio), names in collapsed(values).items():
        held = {"weight_decay": decay, "lr_ratio": ratio}
        groups.append({key: value for key, value in held.items() if value is not None} | {"params": names})
    return escaped(json.dumps(groups, indent=1, ensure_ascii=False, allow_nan=False)) + "\n"


WRITER = Writer(carries=frozenset({"weight_decay", "lr_ratio"}), write=_write, reader="torch.optim")
