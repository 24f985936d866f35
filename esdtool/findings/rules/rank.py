"""`rank`: matrices whose rank has collapsed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from esdtool.analysis.finding import Evidence, Severity
from esdtool.findings.case import Case, Suspect
from esdtool.findings.rule import Found, Rule
from esdtool.spectra.marchenko_pastur import mp_edges

_FULL = 0.9
"""Share of the eigenvalues that must be above numpy's rank tolerance."""

_EFFECTIVE = 0.02
"""Least effective rank over the number of eigenvalues."""

_STABLE = 1.25
"""Least stable rank: below it the largest eigenvalue has 80 % of the sum."""

_SMALLEST = 16
"""Eigenvalues that a judgement needs."""

_EPS32 = float(np.finfo(np.float32).eps)

_SHOWN = 3


def _find(case: Case) -> Iterator[Found]:
    if case.is_difference:
        return  # updates are of low rank as a rule
    found = [(suspect, evidence) for suspect in case if (evidence := _evidence(suspect)) is not None]
    if found:
        yield Found(
            severity=Severity.WARNING,
            modules=tuple(suspect.name for suspect, _ in found),
            evidence=tuple(evidence for _, evidence in found[:_SHOWN]),
            command=case.command(found[0][0].name, "--spectrum svd --sparklines"),
        )


def _evidence(suspect: Suspect) -> Evidence | None:
    """Measure on the eigenvalues themselves: a module whose tail is made of zeros has no alpha and no metrics."""
    module, eigenvalues = suspect.result, suspect.eigenvalues
    if module.rank is not None or eigenvalues is None or eigenvalues.size < _SMALLEST:
        return None
    count = eigenvalues.size
    total, largest = float(eigenvalues.sum()), float(eigenvalues[-1])
    if module.spectrum != "gram-float32":  # which does not tell the smallest from zero
        matrix_rank = int((eigenvalues > (max(module.shape[:2]) * _EPS32) ** 2 * largest).sum())
        if matrix_rank < _FULL * count:
            return Evidence(
                measure="eigenvalues above the rank tolerance of float32",
                module=module.name,
                value=matrix_rank,
                expected=count,
                expected_of="full rank",
            )
    if not suspect.is_matrix:
        return None  # kernels of a convolution may well be copies of each other
    if total / largest < _STABLE:
        return Evidence(
            measure="stable rank",
            module=module.name,
            value=total / largest,
            expected=_random_stable_rank(module.shape, count),
            expected_of="a random matrix of the shape",
        )
    shares = eigenvalues[eigenvalues > 0] / total
    effective = math.exp(-float((shares * np.log(shares)).sum()))
    if effective < _EFFECTIVE * count:
        return Evidence(
            measure="effective rank", module=module.name, value=effective, expected=count, expected_of="a flat spectrum"
        )
    return None


def _random_stable_rank(shape: tuple[int, ...], count: int) -> float:
    """Return the stable rank of a random matrix: its sum over its Marchenko-Pastur edge."""
    rows, columns = shape[:2]
    return count * max(rows, columns) / mp_edges(rows, columns)[1]


RULE = Rule(
    title="Collapsed rank",
    evidence="Fewer than 90 % of at least 16 eigenvalues are above numpy's rank tolerance for float32, or the stable"
    " rank is below 1.25, or the effective rank below 2 % of the number of eigenvalues. Rounding moves the "
    "counts by less than one eigenvalue in a hundred.",
    meaning="The matrix uses a small part of its directions: a factorised or truncated weight, a merged adapter "
    "without its base, attention logits that collapsed onto one direction, or too much weight decay.",
    caveat="A matrix that was compressed by truncation is of low rank on purpose. Heads that do one thing have a small "
    "effective rank in good models; the limits lie below all models of the calibration.",
    action="If nobody truncated the weight, compare with an earlier checkpoint. If somebody did, store its factors: "
    "they are smaller.",
    sources=("Roy and Vetterli 2007 (effective rank)", "Dong, Cordonnier and Loukas 2021, arXiv 2103.03404"),
    find=_find,
    order=40,
    after=frozenset({"dead", "channel", "duplicate"}),
)
