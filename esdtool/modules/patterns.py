"""Regular expressions that a user gives to choose among names: each must be valid, and match something."""

from __future__ import annotations

import re
from collections.abc import Sequence

from esdtool.errors import EsdtoolError, UsageError


def compile_patterns(
    expressions: Sequence[str],
    names: Sequence[str],
    *,
    option: str,
    what: str,
    error: type[EsdtoolError] = UsageError,
) -> list[re.Pattern[str]]:
    """Return the expressions as patterns to be searched in names.

    Args:
        expressions: as given.
        names: all that they may match, sorted.
        option: where they were given, for messages: `--include`, `weight_decay.include`.
        what: what the names are of, for messages: `tensor name`.
        error: class of the errors.

    Raises:
        EsdtoolError: of class `error`, if an expression is none or matches no name.
    """
    patterns = []
    for expression in expressions:
        try:
            pattern = re.compile(expression)
        except re.error as problem:
            where = "" if problem.pos is None else f" at position {problem.pos}"
            raise error(f"{option} {expression!r} is not a regular expression: {problem.msg}{where}") from problem
        if not any(pattern.search(name) for name in names):
            examples = ", ".join(_examples(names)) or "(there are none)"
            raise error(f"{option} {expression!r} matches no {what}; names look like: {examples}")
        patterns.append(pattern)
    return patterns


def _examples(names: Sequence[str]) -> list[str]:
    """Up to three names, weights first, from the start, the middle and the end of the list."""
    pool = [name for name in names if name.endswith("weight")] or list(names)
    return [pool[index] for index in sorted({0, len(pool) // 2, len(pool) - 1})] if pool else []
