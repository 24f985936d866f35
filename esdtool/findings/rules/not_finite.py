"""`not-finite`: modules with NaN or infinite elements."""

from __future__ import annotations

from collections.abc import Iterator

from esdtool.analysis.finding import Evidence, Severity
from esdtool.findings.case import Case
from esdtool.findings.rule import Found, Rule
from esdtool.spectra.scoring import NOT_FINITE


def _find(case: Case) -> Iterator[Found]:
    broken = [suspect for suspect in case if suspect.result.status == NOT_FINITE]
    if broken:
        yield Found(
            severity=Severity.ERROR,
            modules=tuple(suspect.name for suspect in broken),
            evidence=(
                Evidence(
                    measure="modules with NaN or infinite elements",
                    value=len(broken),
                    expected=0,
                    expected_of="a usable checkpoint",
                ),
            ),
        )


RULE = Rule(
    title="NaN or infinite weights",
    evidence="An element of the module is NaN or infinite. The reading is exact.",
    meaning="Training diverged, a conversion to a smaller format overflowed, or the file is damaged.",
    caveat="It does not say when it happened: all later steps of a diverged run look the same.",
    action="Go back to the last checkpoint without NaN, and lower the learning rate or clip gradients from there; "
    "after a conversion, convert again through float32.",
    sources=("IEEE 754: no operation on the activations makes up for such an element",),
    find=_find,
    order=10,
)
