"""`spectrum-yaml`: the list of `unfrozen_parameters` that Spectrum writes and axolotl reads.

Axolotl escapes the dots of these patterns itself and matches them from the start of a name.
"""

from __future__ import annotations

from collections import defaultdict

from esdtool.assignment.allocation import Allocation
from esdtool.assignment.writer import WriteOptions, Writer, comment, unfrozen
from esdtool.support.words import visible


def _write(allocation: Allocation, options: WriteOptions) -> str:
    types: dict[str, list[str]] = defaultdict(list)
    ends = []
    for name, trained in allocation.values("train").items():
        entry = allocation.parameters[name]
        if not trained:
            continue
        if entry.role in ("token-embedding", "output-head"):
            ends.append(name)
        else:
            types[entry.role or "other"].append(name)
    text = [comment(options), "unfrozen_parameters:\n"]
    text += [f"- {unfrozen(name)}\n" for name in ends]
    for kind, names in types.items():
        text.append(f"# {visible(kind)} layers\n")
        text += [f"- {unfrozen(name)}\n" for name in names]
    return "".join(text)


WRITER = Writer(carries=frozenset({"train"}), write=_write, reader="axolotl and Spectrum")
