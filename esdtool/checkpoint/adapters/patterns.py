"""Keys of `rank_pattern` and `alpha_pattern`: regular expressions from a file, matched as PEFT means them but bounded.

PEFT takes the first key for which `re.match(rf"(.*\\.)?({key})$", module)` holds. A key may come from anyone, and
Python's own engine can take exponential time; so keys without operators are compared as text, and the others run under
a limit of time in the package `regex`, which has the same syntax.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import regex

_OPERATORS = frozenset("*+?[](){}|^$\\\n")
"""Characters that make a key more than text; the dot, which stands for any character, is left out."""
_LONGEST_KEY = 1000
_SECONDS = 2.0
"""Time for all matches of one table. A thousand modules against a thousand ordinary keys take a tenth of it."""


class PatternError(Exception):
    """A key that cannot be matched; the message says why."""


class AdapterPatterns:
    """A table of values by pattern.

    >>> table = AdapterPatterns({"layers.1.q_proj": 5, "(up|gate)_proj": 3})
    >>> [table.value(name, 8) for name in ("model.layers.1.q_proj", "mlp.gate_proj", "my_up_proj")]
    [5, 3, 8]
    """

    def __init__(self, table: Mapping[str, Any]) -> None:
        """Compile the keys.

        Raises:
            PatternError: if one is no regular expression, or absurdly long.
        """
        self._values = list(table.values())
        self._texts: dict[int, list[tuple[int, str]]] = defaultdict(list)
        """Position and key, by the key's length."""
        self._expressions: list[tuple[int, str, regex.Pattern[str]]] = []
        self._seconds = _SECONDS
        for position, key in enumerate(table):
            if not _OPERATORS & set(key):
                self._texts[len(key)].append((position, key))
                continue
            if len(key) > _LONGEST_KEY:
                raise PatternError(f"a pattern of {len(key)} characters; the limit is {_LONGEST_KEY}")
            try:
                # With PEFT's own two groups: a reference in the key counts them.
                self._expressions.append((position, key, regex.compile(rf"(.*\.)?({key})$")))
            except (regex.error, RecursionError, OverflowError, MemoryError) as error:
                raise PatternError(f"pattern {key!r} is not a regular expression: {error}") from error

    def value(self, module: str, default: Any) -> Any:
        """Return the value of the first key that matches the end of a module's name, at a dot.

        Raises:
            PatternError: if a key takes too long.
        """
        found = self._by_text(module)
        for position, key, expression in self._expressions:
            if position >= found:
                break
            if self._matches(key, expression, module):
                found = position
                break
        return self._values[found] if found < len(self._values) else default

    def _by_text(self, module: str) -> int:
        """Position of the first key without operators that matches; past the end if none does."""
        starts = [0, *(index + 1 for index, character in enumerate(module) if character == ".")]
        matching = [
            position
            for start in starts
            for position, key in self._texts.get(len(module) - start, ())
            if all(mine in (".", other) for mine, other in zip(key, module[start:], strict=True))
        ]
        return min(matching, default=len(self._values))

    def _matches(self, key: str, expression: regex.Pattern[str], module: str) -> bool:
        begun = time.monotonic()
        try:
            return expression.match(module, timeout=max(self._seconds, 0.001)) is not None
        except TimeoutError as error:
            raise PatternError(
                f"pattern {key!r} takes too long to match; write it without nested repetitions"
            ) from error
        finally:
            self._seconds -= time.monotonic() - begun
