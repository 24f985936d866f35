"""`duplicate`: modules with the same weights, or with the same spectrum."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from esdtool.analysis.finding import Evidence, Severity
from esdtool.findings.case import Case, Suspect
from esdtool.findings.grouping import grouped
from esdtool.findings.rule import Found, Rule
from esdtool.spectra.scoring import ALL_ZERO, NOT_FINITE

_SAME = 1e-5
"""Relative difference of eigenvalues up to which two spectra are one, rounding to float32 included."""

_SMALLEST = 16
"""Eigenvalues that make a spectrum a fingerprint."""

_SHOWN = 3


def _find(case: Case) -> Iterator[Found]:
    if case.is_difference:
        return
    copies = _equal_contents([suspect for suspect in case if suspect.result.status not in (ALL_ZERO, NOT_FINITE)])
    if copies:
        yield _found(case, copies, "modules with the same weights")
    known = {suspect.name for group in copies for suspect in group[1:]}
    alike = _equal_spectra([suspect for suspect in case if suspect.name not in known])
    if alike:
        yield _found(
            case,
            alike,
            "modules with the same spectrum",
            title="Modules with the same spectrum",
            meaning="One matrix is the other, transposed, stored in another format, with its rows or columns in "
            "another order, or rotated: no two trained matrices share all eigenvalues.",
        )


def _found(case: Case, groups: Sequence[Sequence[Suspect]], measure: str, **words: str) -> Found:
    members = [suspect for group in groups for suspect in group]
    layers = {suspect.result.layer for suspect in members if suspect.result.layer is not None}
    total = Evidence(
        measure=f"{measure}, in {len(groups)} groups", value=len(members), expected=0, expected_of="a trained model"
    )
    pairs = tuple(
        Evidence(
            measure=f"{measure}: {', '.join(grouped(suspect.name for suspect in group))}",
            module=group[0].name,
            value=len(group),
            expected=1,
            expected_of="a trained model",
        )
        for group in groups[:_SHOWN]
    )
    return Found(
        severity=Severity.WARNING if len(layers) > 1 or not layers or len(members) > 2 else Severity.INFO,
        modules=tuple(suspect.name for suspect in members),
        evidence=(total, *pairs),
        command=case.explanation(members[0].name),
        **words,
    )


def _equal_contents(suspects: Sequence[Suspect]) -> list[list[Suspect]]:
    groups: dict[str, list[Suspect]] = defaultdict(list)
    for suspect in suspects:
        if suspect.observation is not None:
            groups[suspect.observation.content].append(suspect)
    return [group for group in groups.values() if len(group) > 1]


def _equal_spectra(suspects: Sequence[Suspect]) -> list[list[Suspect]]:
    """Group modules of equal eigenvalues; neighbours in the order of their sums are compared."""
    usable = [suspect for suspect in suspects if suspect.is_matrix and _is_fingerprint(suspect)]
    by_sum = sorted(usable, key=lambda suspect: (_num_eigs(suspect), _sum(suspect)))
    groups: list[list[Suspect]] = []
    for suspect in by_sum:
        if groups and _same(groups[-1][0], suspect):
            groups[-1].append(suspect)
        else:
            groups.append([suspect])
    return [group for group in groups if len(group) > 1]


def _is_fingerprint(suspect: Suspect) -> bool:
    """Tell whether the eigenvalues are many and different: those of all orthogonal matrices are the same."""
    eigenvalues = suspect.eigenvalues
    if eigenvalues is None or eigenvalues.size < _SMALLEST:
        return False
    return float(eigenvalues[-1]) > 1.01 * float(np.median(eigenvalues))


def _num_eigs(suspect: Suspect) -> int:
    return 0 if suspect.eigenvalues is None else suspect.eigenvalues.size


def _sum(suspect: Suspect) -> float:
    return 0.0 if suspect.eigenvalues is None else float(suspect.eigenvalues.sum())


def _same(one: Suspect, other: Suspect) -> bool:
    first, second = one.eigenvalues, other.eigenvalues
    if first is None or second is None or first.size != second.size:
        return False
    return bool(np.allclose(first, second, rtol=_SAME, atol=_SAME * float(first[-1])))


RULE = Rule(
    title="Modules with the same weights",
    evidence="The bytes of two modules are equal, by their SHA-256, or all of at least 16 eigenvalues agree to 1e-5."
    " No weights are held for it. Modules that are zero or not finite are left out. Modules of different "
    "layers, or more than two, are a warning; two of one layer are worth knowing.",
    meaning="A layer was copied (depth up-scaling, a stacked merge, experts cloned from one MLP) and not trained "
    "since, a tensor was saved under two names, or weights are tied that should not be.",
    caveat="Sharing weights is a design in some models (ALBERT, tied embeddings). Equal weights in a merged model "
    "are there on purpose before it is trained further.",
    action="If nobody copied the layer, convert the checkpoint again and compare its index with the original's. If "
    "somebody did, train on, and see the copies part.",
    sources=("exact comparison of hashes and spectra",),
    find=_find,
    order=25,
    after=frozenset({"dead"}),
)
