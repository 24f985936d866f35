"""Decide which modules get a decay of their own, for `assign`, `AlphaDecay` and `train` alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Generic, Protocol, TypeVar

from esdtool.errors import EsdtoolError, UsageError
from esdtool.modules.patterns import compile_patterns
from esdtool.names import canonical_name

BASE_DECAY: Final = "base decay"
"""How the note of a module begins that has the base decay because it could not be scored; the reason follows."""

_SURPRISING_SHARE = 0.1
"""Share of the modules that may lie outside the blocks before leaving them out is worth a warning."""


class Named(Protocol):
    """A parameter of a live model."""

    @property
    def name(self) -> str: ...


class Scorable(Protocol):
    """A weight module, analysed or not."""

    @property
    def name(self) -> str: ...
    @property
    def parameter(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def trained(self) -> Sequence[Named] | None: ...


Module = TypeVar("Module", bound=Scorable)


class Cause(Enum):
    """The reason why a module gets no decay of its own."""

    OUTSIDE_BLOCKS = auto()
    EXCLUDED = auto()
    NOT_INCLUDED = auto()
    LOW_RANK = auto()
    UPDATE = auto()


@dataclass(frozen=True, kw_only=True)
class LeftOut(Generic[Module]):
    """A module that gets no decay of its own."""

    module: Module
    cause: Cause
    reason: str
    """The cause in words, for the user."""


@dataclass(frozen=True, kw_only=True)
class Scope(Generic[Module]):
    """The modules that get a decay of their own, and the others."""

    assigned: tuple[Module, ...]
    left_out: tuple[LeftOut[Module], ...]

    @property
    def remark(self) -> str | None:
        """How many modules are left out and why, as a sentence without its full stop; None if none are."""
        if not self.left_out:
            return None
        total = len(self.assigned) + len(self.left_out)
        counts = Counter(left.reason for left in self.left_out)
        examples = {left.reason: left.module.name for left in reversed(self.left_out)}
        reasons = "; ".join(f"{count} {reason} ({examples[reason]})" for reason, count in counts.most_common())
        return f"{len(self.left_out)} of {total} weight modules get no decay of their own: {reasons}"

    @property
    def is_surprising(self) -> bool:
        """Whether more than a tenth of the modules are left out although the user did not ask for it."""
        outside = sum(left.cause is Cause.OUTSIDE_BLOCKS for left in self.left_out)
        return outside > _SURPRISING_SHARE * (len(self.assigned) + len(self.left_out))


def names_of(module: Scorable) -> tuple[str, ...]:
    """List the names in which a user's expressions are searched: the parameter's, the module's, the trained ones."""
    trained = [canonical_name(parameter.name) for parameter in module.trained or ()]
    return canonical_name(module.parameter), canonical_name(module.name), *trained


@dataclass(frozen=True, kw_only=True)
class Patterns:
    """Regular expressions by which a user chooses modules."""

    include: tuple[re.Pattern[str], ...] = ()
    """If there are any, exactly the modules that match one are assigned."""
    exclude: tuple[re.Pattern[str], ...] = ()
    """Modules that match one are not assigned."""
    prefix: str = "--"
    """What stands before `include` and `exclude` in the words for the user: `--`, `weight_decay.`."""

    @classmethod
    def checked(
        cls,
        include: Sequence[str],
        exclude: Sequence[str],
        names: Iterable[str],
        *,
        others: Iterable[str] = (),
        prefix: str = "--",
        what: str = "analysed parameter",
        error: type[EsdtoolError] = UsageError,
    ) -> Patterns:
        """Compile the expressions.

        Args:
            include: as the user gave them.
            exclude: as the user gave them.
            names: names that an expression may match.
            others: further names that an expression of `exclude` may match: of tensors that are left out anyway.
            prefix: see `Patterns.prefix`.
            what: what the names are of, for messages.
            error: class of the errors.

        Raises:
            EsdtoolError: of class `error`, if an expression is none or matches no name.
        """
        known = sorted(set(names))
        return cls(
            include=tuple(compile_patterns(include, known, option=f"{prefix}include", what=what, error=error)),
            exclude=tuple(
                compile_patterns(exclude, known + sorted(others), option=f"{prefix}exclude", what=what, error=error)
            ),
            prefix=prefix,
        )


def choose(
    modules: Sequence[Module],
    patterns: Patterns,
    *,
    names: Callable[[Module], tuple[str, ...]] = names_of,
) -> Scope[Module]:
    """Decide which modules get a decay of their own.

    By default those of the model's blocks, and all modules of a model without blocks. Low-rank updates get none:
    their factors are the parameters.

    Args:
        modules: every scored module of the model.
        patterns: the user's choice.
        names: the names of a module in which the expressions are searched.
    """
    assigned: list[Module] = []
    left_out: list[LeftOut[Module]] = []
    for module, inside in zip(modules, in_blocks(module.layer for module in modules), strict=True):
        found = _cause(module, patterns, names(module), inside=inside)
        if found is None:
            assigned.append(module)
        else:
            cause, reason = found
            left_out.append(LeftOut(module=module, cause=cause, reason=reason))
    return Scope(assigned=tuple(assigned), left_out=tuple(left_out))


def in_blocks(layers: Iterable[int | None]) -> list[bool]:
    """Tell which modules are assigned by default: those of blocks, or all of them if the model has no blocks.

    >>> in_blocks([None, 0, 1, None]), in_blocks([None, None])
    ([False, True, True, False], [True, True])
    """
    inside = [layer is not None for layer in layers]
    return inside if any(inside) else [True] * len(inside)


def _cause(module: Scorable, patterns: Patterns, names: tuple[str, ...], *, inside: bool) -> tuple[Cause, str] | None:
    """Find why a module is left out; None if it is assigned."""
    for pattern in patterns.exclude:
        if any(pattern.search(name) for name in names):
            return Cause.EXCLUDED, f"excluded by {patterns.prefix}exclude {pattern.pattern!r}"
    if module.rank is not None:
        return Cause.LOW_RANK, "low-rank update: its factors are the parameters, and share its spectrum"
    if module.trained is not None and not module.trained:
        return Cause.UPDATE, "update of an adapter: its factors are the parameters"
    if patterns.include:
        if any(pattern.search(name) for pattern in patterns.include for name in names):
            return None
        return Cause.NOT_INCLUDED, f"not matched by {patterns.prefix}include"
    return None if inside else (Cause.OUTSIDE_BLOCKS, "outside the numbered blocks; include it by name to assign it")
