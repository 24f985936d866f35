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
    Fused    several projections side by side in one tensor: recognised, not scored
    Stacked  the same projection of several experts in one tensor: recognised, not scored

`Fused` and `Stacked` carry the roles of their parts: code that learns to split such a tensor
extends these two classes with a layout; the tables keep their form.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

from esdtool.modules.names import Segments

ROOT_PREFIXES = frozenset({"base_model", "model", "transformer", "language_model"})
"""Outer segments that `^` looks through."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The tensor is one matrix of weights."""

    role: str
    """Role in the block, e.g. `q_proj`."""


@dataclass(frozen=True, kw_only=True)
class Skip:
    """The tensor is left out."""

    reason: str
    """In words, for the user."""
    forceable: bool = True
    """Whether the tensor is a matrix of weights all the same, so that `include` may bring it in."""


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Several projections are stored side by side in one matrix (or in one matrix per expert)."""

    parts: tuple[str, ...]
    """What the parts are, in order, e.g. `("q_proj", "k_proj", "v_proj")`."""

    @property
    def reason(self) -> str:
        """In words, for the user."""
        return f"fused: {_enumerate(self.parts)} in one tensor; this version does not split it"


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """Matrices of several experts are stored in one tensor."""

    parts: tuple[str, ...]
    """Roles within each expert's matrix: one, or several if it is fused as well."""
    experts: int | None = None
    """Number of experts; None where the shape does not tell."""

    @property
    def reason(self) -> str:
        """In words, for the user."""
        fused = "fused " if len(self.parts) > 1 else ""
        experts = "all experts" if self.experts is None else f"{self.experts} experts"
        return f"stacked: {fused}{_enumerate(self.parts)} of {experts} in one tensor; this version does not split it"


Verdict = Score | Skip | Fused | Stacked


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a table. Written with `score`, `skip`, `fused` or `stacked`."""

    pattern: str
    """Pattern of the module's name; see the description of this file."""
    verdict: Verdict
    beside: str | None = None
    """If given, the rule holds only where the module's parent has a child of this name."""
    regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "regex", compile_pattern(self.pattern))


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


def score(pattern: str, role: str, *, beside: str | None = None) -> Rule:
    """A rule: modules named so are one matrix, with this role."""
    return Rule(pattern=pattern, verdict=Score(role=role), beside=beside)


def skip(pattern: str, reason: str, *, forceable: bool = True, beside: str | None = None) -> Rule:
    """A rule: tensors named so are left out for this reason."""
    return Rule(pattern=pattern, verdict=Skip(reason=reason, forceable=forceable), beside=beside)


def fused(pattern: str, *parts: str, beside: str | None = None) -> Rule:
    """A rule: modules named so hold these projections side by side."""
    return Rule(pattern=pattern, verdict=Fused(parts=parts), beside=beside)


def stacked(pattern: str, *parts: str) -> Rule:
    """A rule: tensors named so hold the matrices of all experts."""
    return Rule(pattern=pattern, verdict=Stacked(parts=parts))


@functools.cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern of this language as a regular expression on the dotted module path.

    Raises:
        ValueError: if the pattern has an empty segment, or `**` elsewhere than at the end.
    """
    anchored = pattern.startswith("^")
    segments = pattern.removeprefix("^").split(".")
    beneath = segments[-1] == "**"
    if beneath:
        segments.pop()
    if not segments or any(not segment or "**" in segment for segment in segments):
        raise ValueError(f"bad pattern {pattern!r}: empty segment, or '**' that is not the last segment")
    body = r"\.".join(f"(?:{_segment_regex(segment)})" for segment in segments)
    return re.compile(("^" if anchored else r"(?:^|\.)") + body + (r"(?:\..*)?$" if beneath else "$"))


def matches(rule: Rule, path: Segments) -> bool:
    """Whether the rule's pattern matches a module path (its `beside` is not looked at)."""
    if rule.pattern.startswith("^"):
        start = 0
        while start < len(path) - 1 and path[start] in ROOT_PREFIXES:
            start += 1
        path = path[start:]
    return rule.regex.search(".".join(path)) is not None


def _segment_regex(segment: str) -> str:
    return re.escape(segment).replace(r"\|", "|").replace(r"\*", r"[^.]*").replace(r"\#", r"\d+").replace("#", r"\d+")


def _enumerate(parts: tuple[str, ...]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
