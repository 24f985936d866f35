"""`traps`: single elements that make the largest eigenvalue of their matrix (correlation traps)."""

from __future__ import annotations

from collections.abc import Iterator

from esdtool.analysis.finding import Evidence, Severity
from esdtool.findings.case import Case, Suspect
from esdtool.findings.rule import Found, Rule
from esdtool.spectra.elements import TrapStatistics

_SHARE = 0.5
"""Least share of the largest eigenvalue that the largest element makes."""

_SHOWN = 3


def _find(case: Case) -> Iterator[Found]:
    found = [(suspect, *trap) for suspect in case if (trap := _trap(suspect)) is not None]
    if found:
        found.sort(key=lambda item: -item[2])
        yield Found(
            severity=Severity.INFO,
            modules=tuple(suspect.name for suspect, _, _ in found),
            evidence=tuple(
                Evidence(
                    measure=f"eigenvalue that element [{trap.row}, {trap.column}], {trap.deviation:.0f} standard "
                    f"deviations from the mean, makes alone, over the largest ({trap.count} such elements)",
                    module=suspect.name,
                    value=share,
                    expected=0,
                    expected_of="no trap",
                )
                for suspect, trap, share in found[:_SHOWN]
            ),
            command=case.command(found[0][0].name, "--html report.html"),
        )


def _trap(suspect: Suspect) -> tuple[TrapStatistics, float] | None:
    """Return a module's traps, and what the largest makes of its largest eigenvalue."""
    elements = None if suspect.observation is None else suspect.observation.elements
    traps = None if elements is None else elements.traps
    largest = suspect.result.lambda_max
    if traps is None or not largest or not suspect.is_matrix:
        return None
    share = traps.eigenvalue / largest
    return (traps, share) if share >= _SHARE else None


RULE = Rule(
    title="Single elements make the largest eigenvalue",
    evidence="An element lies farther than s (rows columns)^(1/4) from the mean, so that it makes an eigenvalue that a "
    "shuffle of all elements leaves in place, and this eigenvalue is at least half the largest one. Both are computed "
    "from the elements, without a random draw.",
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
