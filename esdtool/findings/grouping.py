"""Names of many modules in a few lines: those that differ in numbers only share one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def grouped(names: Iterable[str]) -> tuple[str, ...]:
    """Put names together that differ in their numbers only, in the order of their first.

    >>> grouped(["layers.0.up", "layers.1.up", "layers.3.up", "head"])
    ('layers.{0-1,3}.up (3)', 'head')
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_NUMBER.sub("*", name), []).append(name)
    return tuple(_line(members) for members in groups.values())


def _line(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    positions = zip(*([int(number) for number in _NUMBER.findall(name)] for name in names), strict=True)
    spans = iter([_spans(sorted(set(numbers))) for numbers in positions])
    return f"{_NUMBER.sub(lambda _: next(spans), names[0])} ({len(names)})"


def _spans(numbers: Sequence[int]) -> str:
    """Write numbers as runs.

    >>> _spans([0, 1, 2, 5]), _spans([7])
    ('{0-2,5}', '7')
    """
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if len(shown) > 6:
        shown = [*shown[:5], "..."]
    return "{" + ",".join(shown) + "}"
