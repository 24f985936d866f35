"""Names of many modules in a few lines: those that differ in numbers only share one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


_FEWEST = 3
"""Names that stand in the same layers and share a line."""

_SHOWN = 3
"""Names that such a line spells out."""


def grouped(names: Iterable[str]) -> tuple[str, ...]:
    """Put names together that differ in their numbers only, or stand in the same layers; in the order of their first.

    >>> grouped(["layers.0.up", "layers.1.up", "layers.3.up", "head"])
    ('layers.{0-1,3}.up (3)', 'head')
    >>> grouped(["layers.2.q", "layers.2.k", "layers.2.v", "layers.2.o"])
    ('layers.2.{q,k,v,...} (4)',)
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_NUMBER.sub("*", name), []).append(name)
    beside: dict[tuple[str, ...], list[str]] = {}
    for pattern, members in alike.items():
        head, number, tail = pattern.partition(".*.")
        # Only where one number tells all of them apart.
        key: tuple[str, ...] = (head, _numbers(members)[0]) if number and "*" not in tail else (pattern,)
        beside.setdefault(key, []).append(pattern)
    lines: list[str] = []
    for key, patterns in beside.items():
        if len(key) == 1 or len(patterns) < _FEWEST:
            lines += [_line(alike[pattern]) for pattern in patterns]
            continue
        tails = [pattern.partition(".*.")[2] for pattern in patterns]
        shown = ",".join(tails[:_SHOWN]) + (",..." if len(tails) > _SHOWN else "")
        count = sum(len(alike[pattern]) for pattern in patterns)
        lines.append(f"{key[0]}.{key[1]}.{{{shown}}} ({count})")
    return tuple(lines)


def _line(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    spans = iter(_numbers(names))
    return f"{_NUMBER.sub(lambda _: next(spans), names[0])} ({len(names)})"


def _numbers(names: Sequence[str]) -> list[str]:
    """Write the numbers at each place of names that differ in nothing else."""
    positions = zip(*([int(number) for number in _NUMBER.findall(name)] for name in names), strict=True)
    return [_spans(sorted(set(numbers))) for numbers in positions]


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
