"""`axolotl`: `lr_groups` and `unfrozen_parameters` of an axolotl configuration.

A name in `lr_groups` is a substring of parameter names, not a pattern, and the rate is absolute. Parameters whose names
contain `embed_tokens` or `lm_head` never join such a group: their rate is `embedding_lr`. In `unfrozen_parameters`
axolotl escapes the dots itself, so that escaped ones would match nothing.
"""

from __future__ import annotations

from esdtool.assignment.allocation import Allocation
from esdtool.assignment.writer import (
    WriteOptions,
    Writer,
    collapsed,
    comment,
    needed_learning_rate,
    number,
    quoted,
    unfrozen,
)
from esdtool.errors import UsageError

_EMBEDDINGS = ("embed_tokens", "lm_head")


def _write(allocation: Allocation, options: WriteOptions) -> str:
    text = [comment(options)]
    ratios = allocation.values("lr_ratio")
    if ratios:
        rate = needed_learning_rate(options, "axolotl")
        ends = {ratio for name, ratio in ratios.items() if any(end in name for end in _EMBEDDINGS)}
        inside = {name: ratio for name, ratio in ratios.items() if not any(end in name for end in _EMBEDDINGS)}
        _check_substrings(inside)
        if len(ends) > 1:
            raise UsageError("axolotl has one embedding_lr, but the embedding and the head have different ratios")
        text.append(f"learning_rate: {number(rate)}\n")
        text += [f"embedding_lr: {number(rate * ratio)}\n" for ratio in ends]
        text.append("lr_groups:\n")
        for index, (ratio, names) in enumerate(collapsed(inside).items()):
            text.append(f"  - name: esdtool_{index}\n    modules:\n")
            text += [f"      - {quoted(name)}\n" for name in names]
            text.append(f"    lr: {number(rate * ratio)}\n")
    train = allocation.values("train")
    if train:
        text.append("unfrozen_parameters:\n")
        text += [f"  - {quoted(unfrozen(name))}\n" for name, trained in train.items() if trained]
    return "".join(text)


def _check_substrings(ratios: dict[str, float]) -> None:
    """Refuse names of which one is a part of another with another rate: axolotl takes the first that it contains."""
    names = list(ratios)
    for name in names:
        for other in names:
            if name != other and name in other and ratios[name] != ratios[other]:
                raise UsageError(
                    f"axolotl looks for {name} as a part of names, and {other} contains it with another rate: "
                    "choose another format"
                )


WRITER = Writer(
    carries=frozenset({"lr_ratio", "train"}),
    write=_write,
    reader="axolotl",
    why_not="its lr_groups know learning rates only",
    absolute=True,
)
