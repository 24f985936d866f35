"""`overflow`: weights, or products with them, beyond the range of float16."""

from __future__ import annotations

import math
from collections.abc import Iterator

from esdtool.analysis.finding import Evidence, Severity
from esdtool.findings.case import Case, Suspect
from esdtool.findings.rule import Found, Rule

FLOAT16_MAX = 65504.0
"""Largest finite float16."""

_SHOWN = 3


def _find(case: Case) -> Iterator[Found]:
    if case.is_difference:
        return
    large = [(suspect, peak) for suspect in case if (peak := _peak(suspect)) > FLOAT16_MAX]
    if large:
        yield _found(
            Severity.ERROR,
            sorted(large, key=lambda pair: -pair[1]),
            "largest absolute element",
            title="Weights beyond float16",
            meaning="Stored or loaded as float16, these elements become infinite.",
            caveat="In bfloat16 and float32 they are finite; whether they are meant is another question.",
            action="Keep the model in bfloat16 or float32, and look where such weights come from.",
        )
    known = {suspect.name for suspect, _ in large}
    risky = [
        (suspect, output)
        for suspect in case
        if suspect.name not in known and (output := _largest_output(suspect)) > FLOAT16_MAX
    ]
    if risky:
        yield _found(
            Severity.WARNING,
            sorted(risky, key=lambda pair: -pair[1]),
            "largest output for an input of root mean square 1",
        )


def _found(severity: Severity, pairs: list[tuple[Suspect, float]], measure: str, **words: str) -> Found:
    return Found(
        severity=severity,
        modules=tuple(suspect.name for suspect, _ in pairs),
        evidence=tuple(
            Evidence(
                measure=measure,
                module=suspect.name,
                value=value,
                expected=FLOAT16_MAX,
                expected_of="the largest float16",
            )
            for suspect, value in pairs[:_SHOWN]
        ),
        **words,
    )


def _peak(suspect: Suspect) -> float:
    elements = None if suspect.observation is None else suspect.observation.elements
    return 0.0 if elements is None else elements.largest


def _largest_output(suspect: Suspect) -> float:
    norm = suspect.result.spectral_norm
    if norm is None or not suspect.is_matrix:
        return 0.0
    return norm * math.sqrt(min(suspect.result.shape))


RULE = Rule(
    title="Outputs may overflow float16",
    evidence="The spectral norm times the square root of the short side exceeds 65,504: an input of root mean square"
    " 1, as a norm layer gives, along the first singular vector, has an output of this length. An element "
    "beyond 65,504 is an error.",
    meaning="Run in float16, the module can turn a normal input into an infinite output.",
    caveat="It is a bound for the worst input: real inputs are seldom along the first singular vector, and the "
    "output spreads over all its elements. Nothing is said about bfloat16, whose range is that of float32.",
    action="Run the model in bfloat16, or scale the module's input down and its successor up.",
    sources=("IEEE 754-2008, binary16", "|W x| <= s_max |x|"),
    find=_find,
    order=28,
)
