"""`rounding`: spectra of which the small end is the rounding of the stored weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from esdtool.analysis.finding import Evidence, Severity
from esdtool.findings.case import Case, Suspect
from esdtool.findings.rule import Found, Rule

_SHARE = 0.1
"""Share of the eigenvalues below the floor from which on it is said."""

_ALL = 0.95
"""Share from which on a difference is nothing but rounding."""

_REACH = 30.0
"""Largest eigenvalue over the floor of a difference that is nothing but rounding.

Weights far above the root mean square round more coarsely than the floor assumes: 6 is reached by all-MiniLM-L6-v2
stored in bfloat16. A low-rank update leaves as many eigenvalues at the floor, and lies orders of magnitude above it.
"""

_SHOWN = 3


def _find(case: Case) -> Iterator[Found]:
    shares = [(suspect, share) for suspect in case if (share := _share_below(suspect)) is not None]
    lost = [(suspect, share) for suspect, share in shares if case.is_difference and _is_all(suspect, share)]
    if lost:
        yield _found(
            Severity.WARNING,
            lost,
            title="Differences that are rounding",
            meaning="The change of these weights is no larger than the rounding of their storage: the checkpoints "
            "differ in format, and training did not move these modules.",
            caveat="A change smaller than the rounding may have been there before the weights were stored.",
            action="Compare checkpoints that were saved in one format, the finer one.",
        )
        shares = [pair for pair in shares if not _is_all(*pair)]
    if some := [(suspect, share) for suspect, share in shares if share >= _SHARE]:
        yield _found(Severity.INFO, some)


def _found(severity: Severity, shares: list[tuple[Suspect, float]], **words: str) -> Found:
    shares = sorted(shares, key=lambda pair: -pair[1])
    return Found(
        severity=severity,
        modules=tuple(suspect.name for suspect, _ in shares),
        evidence=tuple(
            Evidence(
                measure=f"share of the eigenvalues at or below the rounding floor of {suspect.result.dtype}",
                module=suspect.name,
                value=share,
                uncertainty=float(np.sqrt(share * (1 - share) / suspect.result.num_eigs)),
                expected=0,
                expected_of="exact weights",
            )
            for suspect, share in shares[:_SHOWN]
        ),
        **words,
    )


def _is_all(suspect: Suspect, share: float) -> bool:
    """Tell whether a difference has no eigenvalue that stands out of the rounding."""
    eigenvalues, observation = suspect.eigenvalues, suspect.observation
    if eigenvalues is None or observation is None or observation.storage_floor is None:
        return False
    return share >= _ALL and bool(eigenvalues[-1] <= _REACH * observation.storage_floor)


def _share_below(suspect: Suspect) -> float | None:
    eigenvalues, observation = suspect.eigenvalues, suspect.observation
    if (
        eigenvalues is None
        or observation is None
        or observation.storage_floor is None
        or suspect.result.rank is not None
    ):
        return None
    return float(np.mean(eigenvalues <= observation.storage_floor))


RULE = Rule(
    title="The small eigenvalues are rounding",
    evidence="At least 10 % of the eigenvalues lie at or below the floor e² s² (√rows + √columns)², where s is the "
    "root mean square of the weights and e the relative error of their format. In a difference from a base "
    "95 % make a warning if the largest eigenvalue is no more than 30 times the floor: it is nothing but rounding. A "
    "larger one is a change of low rank.",
    meaning="The file is quantised, or the matrix is of low rank but for its rounding: the lower end of the "
    "spectrum, the smallest eigenvalue, the condition and the entropy are those of the format, not of the "
    "model.",
    caveat="It says nothing against the model: the large eigenvalues, and alpha where its tail lies above the floor,"
    " are right.",
    action="For the lower end, analyse the weights from before quantisation.",
    sources=("Marchenko and Pastur 1967 (independent errors form a random matrix)",),
    find=_find,
    order=60,
    after=frozenset({"dead"}),
)
