"""`traps`: single elements that make the largest eigenvalue of their matrix (correlation traps)."""

from __future__ import annotations

from collections.abc import Iterator

from esdtool.analysis.finding import Evidence, Severity
from esdtool.findings.case import Case, Suspect
from esdtool.findings.rule import Found, Rule
from esdtool.spectra.trap_records import TrapElement
from esdtool.support.words import counted

_SHARE = 0.5
"""Least share of the largest eigenvalue that the largest element makes."""

_SHOWN = 3


def _find(case: Case) -> Iterator[Found]:
    found = [(suspect, *largest) for suspect in case if (largest := _largest(suspect)) is not None]
    if found:
        found.sort(key=lambda item: -item[2])
        yield Found(
            severity=Severity.INFO,
            modules=tuple(suspect.name for suspect, _, _ in found),
            evidence=tuple(
                Evidence(
                    measure=f"eigenvalue that element [{element.row}, {element.column}] = {element.value:.3g} makes "
                    f"alone, over the largest ({counted(_count(suspect), 'such element')})",
                    module=suspect.name,
                    value=share,
                    expected=0,
                    expected_of="no trap",
                )
                for suspect, element, share in found[:_SHOWN]
            ),
            command=case.command(found[0][0].name, "--html report.html"),
        )


def _largest(suspect: Suspect) -> tuple[TrapElement, float] | None:
    """Return the element that makes a module's largest trap, and the share of the largest eigenvalue that it makes."""
    traps, largest = suspect.result.traps, suspect.result.lambda_max
    if traps is None or not traps.elements or not largest or not suspect.is_matrix:
        return None
    element = traps.elements[0]
    if element.eigenvalue is None:
        return None
    share = element.eigenvalue / largest
    return (element, share) if share >= _SHARE else None


def _count(suspect: Suspect) -> int:
    return 0 if suspect.result.traps is None else suspect.result.traps.from_elements


RULE = Rule(
    title="Single elements make the largest eigenvalue",
    evidence="An element lies so far from the mean that it makes an eigenvalue above the noise that a shuffle of all "
    "elements leaves (`num_traps` of the measures), and this eigenvalue is at least half the largest one. Both are "
    "computed from the elements, without a random draw. A trap that the mean of all elements makes is counted there, "
    "too, but is no finding: it is no outlying weight.",
    meaning="A correlation trap: the top of the spectrum, and the spectral norm, are those of an outlying weight and"
    " no pattern over many. The literature reads many of them as memorisation.",
    caveat="Good language models have such weights, mostly where a projection writes into the residual stream. That "
    "they harm is shown for small models that were trained far beyond their best.",
    action="Quantise the module per channel. If such elements become more from checkpoint to checkpoint while "
    "validation loss rises, stop earlier or decay more.",
    sources=(
        "Benaych-Georges and Nadakuditi 2012 (spikes of rectangular matrices)",
        "Martin and Hinrichs 2025, arXiv 2506.04434 (correlation traps)",
    ),
    find=_find,
    order=50,
    after=frozenset({"dead", "channel"}),
)
