"""The language of the rule tables: a pattern of a module's name, and the verdict on its tensor.

A pattern is a dotted path that must match the END of the module's name (the parameter's
without `.weight`, wrappers such as `module.` removed), segment by segment:

    mlp.fc1                  the module `fc1` of any `mlp`
    self_attn|attn.out_proj  alternatives within one segment
    *_norm                   `*`: any characters within one segment
    layers.#.fc1             `#`: a whole number
    embeddings.**            `**`, at the end: the module itself and everything beneath
    ^output                  `^`: the whole name, apart from outer prefixes such as `model.`

The first rule that matches decides. A verdict is one of

    Score    one matrix of weights (or one convolution): it is scored under its role
    Skip     no weight matrix to score, for the stated reason
    Fused    several projections side by side in one tensor: each is scored under its own role
    Stacked  the same projections of several experts in one tensor, split expert by expert

`Fused` and `Stacked` carry the roles of their parts and a layout (`esdtool.modules.layouts`) that
says where each of them lies.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from esdtool.modules.layouts import Layout, equal, gate_up
from esdtool.modules.skipped import SkipKind, SkipReason
from esdtool.names import Segments, without_root


@dataclass(frozen=True, kw_only=True)
class Score:
    """The tensor is one matrix of weights."""

    role: str
    """Role in the block, e.g. `q_proj`."""
    halves: tuple[str, str] = ("gate_proj", "up_proj")
    """Roles of its halves, where its shape shows that an `up_proj` is two projections."""
    headwise: bool = False
    """Whether three dimensions are [heads, rows, columns]: a matrix for each head, block by block on the diagonal."""


@dataclass(frozen=True, kw_only=True)
class Skip:
    """The tensor is left out."""

    reason: SkipReason
    forceable: bool = True
    """Whether the tensor is a matrix of weights all the same, so that `include` may bring it in."""


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Several projections are stored side by side in one matrix."""

    parts: tuple[str, ...]
    """Roles of the parts, in order, e.g. `("q_proj", "k_proj", "v_proj")`."""
    layout: Layout = equal
    """Where they lie."""

    @property
    def reason(self) -> str:
        """In words, for the user, where it cannot be split."""
        return f"fused: {_enumerate(self.parts)} in one tensor"


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """Matrices of several experts are stored in one tensor, [experts, ., .] or [experts * ., .]."""

    parts: tuple[str, ...]
    """Roles within each expert's matrix: one, or several if it is fused as well."""
    layout: Layout = gate_up
    """Where the parts of a fused one lie in the matrix of one expert."""

    @property
    def reason(self) -> str:
        """In words, for the user, where it cannot be split."""
        fused = "fused " if len(self.parts) > 1 else ""
        return f"stacked: {fused}{_enumerate(self.parts)} of all experts in one tensor"


Verdict = Score | Skip | Fused | Stacked


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a table. Written with `score`, `skip`, `fused` or `stacked`."""

    pattern: str
    """Pattern of the module's name; see the description of this file."""
    verdict: Verdict
    beside: str | None = None
    """If given, the rule holds only where the module's parent has a child of this name."""

    def __post_init__(self) -> None:
        _segments(self.pattern)

    @functools.cached_property
    def regex(self) -> re.Pattern[str]:
        """The pattern as a regular expression; compiled when it is asked for, since most tables never are."""
        return compile_pattern(self.pattern)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A table of rules for models that name their modules alike."""

    name: str
    """For messages and tests, e.g. `bert`."""
    rules: tuple[Rule, ...]
    """In order of precedence."""
    model_types: frozenset[str] = frozenset()
    """Values of `model_type` in config.json for which the table holds. Empty: it may hold for any model,
    which suits names that mean the same thing everywhere."""
    marker: str | None = None
    """Pattern of a module that only this family has: a table with `model_types` holds where it is found, too."""
    more_markers: tuple[str, ...] = ()
    """Further patterns, each of which establishes the family as `marker` does."""

    @property
    def markers(self) -> tuple[str, ...]:
        """All patterns that establish the family."""
        return (*(() if self.marker is None else (self.marker,)), *self.more_markers)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rules in order of precedence, under a name for the user."""

    name: str
    rules: tuple[Rule, ...]
    is_established: bool = False
    """Whether it is the table of a family that the checkpoint is known to belong to."""


def score(
    pattern: str,
    role: str,
    *,
    beside: str | None = None,
    halves: tuple[str, str] = ("gate_proj", "up_proj"),
    headwise: bool = False,
) -> Rule:
    """Make the rule that modules with such a name are one matrix, with this role."""
    return Rule(pattern=pattern, verdict=Score(role=role, halves=halves, headwise=headwise), beside=beside)


def skip(pattern: str, reason: SkipReason | str, *, forceable: bool = True, beside: str | None = None) -> Rule:
    """Make the rule that tensors with such a name are left out; a reason in words alone is of the kind `other`."""
    if isinstance(reason, str):
        reason = SkipReason(kind=SkipKind.OTHER, words=reason)
    return Rule(pattern=pattern, verdict=Skip(reason=reason, forceable=forceable), beside=beside)


def fused(pattern: str, *parts: str, layout: Layout = equal, beside: str | None = None) -> Rule:
    """Make the rule that modules with such a name hold these projections side by side."""
    return Rule(pattern=pattern, verdict=Fused(parts=parts, layout=layout), beside=beside)


def stacked(pattern: str, *parts: str, layout: Layout = gate_up) -> Rule:
    """Make the rule that tensors with such a name hold the matrices of all experts."""
    return Rule(pattern=pattern, verdict=Stacked(parts=parts, layout=layout))


@functools.cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Turn a pattern of this language into a regular expression on the dotted module path.

    Raises:
        ValueError: if the pattern has an empty segment, or `**` elsewhere than at the end.
    """
    segments, beneath = _segments(pattern)
    body = r"\.".join(f"(?:{_segment_regex(segment)})" for segment in segments)
    start = "^" if pattern.startswith("^") else r"(?:^|\.)"
    return re.compile(start + body + (r"(?:\..*)?$" if beneath else "$"))


def _segments(pattern: str) -> tuple[list[str], bool]:
    """Take a pattern apart into its segments, and whether it goes on with `**`.

    Raises:
        ValueError: if the pattern has an empty segment, or `**` elsewhere than at the end.
    """
    segments = pattern.removeprefix("^").split(".")
    beneath = segments[-1] == "**"
    if beneath:
        segments.pop()
    if not segments or any(not segment or "**" in segment for segment in segments):
        raise ValueError(f"bad pattern {pattern!r}: empty segment, or '**' that is not the last segment")
    return segments, beneath


def matches(rule: Rule, path: Segments, *, root: int = 0) -> bool:
    """Return whether the rule's pattern matches a module path (its `beside` is not looked at).

    Args:
        rule: the rule.
        path: segments of the module's name.
        root: how many of them the names of the whole checkpoint begin with (`common_root`).
    """
    if rule.pattern.startswith("^"):
        path = without_root(path[root:])
    return rule.regex.search(".".join(path)) is not None


@functools.cache
def names_a_number(rule: Rule) -> bool:
    """Return whether the rule means one number among others, such as `mlp.2`."""
    return any(part.isdecimal() for segment in rule.pattern.split(".") for part in segment.split("|"))


def _segment_regex(segment: str) -> str:
    return re.escape(segment).replace(r"\|", "|").replace(r"\*", r"[^.]*").replace(r"\#", r"\d+").replace("#", r"\d+")


def _enumerate(parts: tuple[str, ...]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
