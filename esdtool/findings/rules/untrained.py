"""`untrained`: spectra that cannot be told from those of random matrices of the same shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from esdtool.analysis.finding import Evidence, Severity
from esdtool.findings.case import Case, Suspect, Vector
from esdtool.findings.rule import Found, Rule
from esdtool.spectra.marchenko_pastur import mp_edges
from esdtool.spectra.null_distance import null_distance, random_distance

_MOST_DEVIATIONS = 3.5
"""Standard deviations of a random matrix's distance within which a spectrum counts as random."""

_BEYOND_THE_EDGE = 4.0
"""Tracy-Widom units beyond the edge within which the largest eigenvalue of a random matrix lies in nearly all draws."""

_DISPERSION = 4.0
"""Standard errors by which the sums of squares of rows, and of columns, may vary more than those of independent
elements."""

_FLAT = 1e-3
"""Relative spread of the eigenvalues below which a matrix counts as a multiple of an orthogonal one."""

_SMALLEST = 16
"""Eigenvalues that a judgement needs."""

_SHOWN = 3


def _find(case: Case) -> Iterator[Found]:
    if case.is_difference:
        return  # an update may well be noise; `rounding` says when it is nothing else
    judged = [
        suspect
        for suspect in case
        if suspect.is_matrix and suspect.eigenvalues is not None and suspect.eigenvalues.size >= _SMALLEST
    ]
    random = [suspect for suspect in judged if _is_random(suspect)]
    inside = [suspect for suspect in random if suspect.result.layer is not None]
    outside = [suspect for suspect in random if suspect.result.layer is None]
    if 2 * len(random) > len(judged):
        yield _found(case, Severity.WARNING, random, judged, title="Most of the model looks untrained")
    else:
        if inside:
            yield _found(case, Severity.ERROR, inside, judged)
        if outside:
            yield _found(
                case,
                Severity.INFO,
                outside,
                judged,
                title="Modules outside the layers that look untrained",
                meaning="A head or a pooler that the training objective did not use, and that was saved as it was "
                "initialised.",
                action="Do not build on the output of these modules; train them, or leave them out.",
            )
    if flat := [suspect for suspect in judged if _is_flat(suspect)]:
        yield Found(
            severity=Severity.INFO,
            modules=tuple(suspect.name for suspect in flat),
            evidence=(
                Evidence(
                    measure="modules whose eigenvalues are all equal to 0.1 %",
                    value=len(flat),
                    expected=0,
                    expected_of="trained weights",
                ),
            ),
            title="Modules that are orthogonal",
            meaning="An orthogonal initialisation that was never trained, an identity, or a constraint to orthogonal"
            " matrices.",
            action="If nothing keeps these weights orthogonal, see that they are loaded, and that they get gradients.",
            command=case.explanation(flat[0].name),
        )


def _found(case: Case, severity: Severity, random: Sequence[Suspect], judged: Sequence[Suspect], **words: str) -> Found:
    clearest = sorted(random, key=_deviation)
    return Found(
        severity=severity,
        modules=tuple(suspect.name for suspect in random),
        evidence=(
            Evidence(
                measure=f"modules that look random, of {len(judged)}",
                value=len(random),
                expected=0,
                expected_of="a trained model",
            ),
            *map(_evidence, clearest[:_SHOWN]),
        ),
        command=case.explanation(clearest[0].name),
        **words,
    )


def _evidence(suspect: Suspect) -> Evidence:
    expected, spread = random_distance(*suspect.result.shape)
    eigenvalues = suspect.eigenvalues
    assert eigenvalues is not None
    return Evidence(
        measure="distance from a random spectrum",
        module=suspect.name,
        value=null_distance(eigenvalues, *suspect.result.shape),
        expected=expected,
        expected_spread=spread,
        expected_of="a random matrix of the shape",
    )


def _deviation(suspect: Suspect) -> float:
    """Return how many standard deviations the spectrum is farther from random than a random one."""
    assert suspect.eigenvalues is not None
    expected, spread = random_distance(*suspect.result.shape)
    return (null_distance(suspect.eigenvalues, *suspect.result.shape) - expected) / spread


def _is_random(suspect: Suspect) -> bool:
    eigenvalues = suspect.eigenvalues
    assert eigenvalues is not None
    near = _deviation(suspect) <= _MOST_DEVIATIONS and _has_even_channels(suspect)
    return near and not _is_flat(suspect) and edge_excess(eigenvalues, *suspect.result.shape) <= _BEYOND_THE_EDGE


def _has_even_channels(suspect: Suspect) -> bool:
    """Tell whether rows and columns vary no more than those of independent elements."""
    elements = None if suspect.observation is None else suspect.observation.elements
    if elements is None:
        return True
    sides = (elements.rows, elements.columns)
    return all(side.dispersion <= 1 + _DISPERSION / math.sqrt(2 * side.count) for side in sides)


def edge_excess(eigenvalues: Vector, rows: int, columns: int) -> float:
    """Return how far the largest eigenvalue lies beyond the edge of a random matrix, in Tracy-Widom units.

    Centre and scale are those of Johnstone (2001) for a matrix of Gaussian elements with the same mean square.
    """
    mean_square = float(eigenvalues.sum()) / (rows * columns)
    scale = (math.sqrt(rows) + math.sqrt(columns)) * (1 / math.sqrt(rows) + 1 / math.sqrt(columns)) ** (1 / 3)
    excess: float = (float(eigenvalues[-1]) / mean_square - mp_edges(rows, columns)[1]) / scale
    return excess


def _is_flat(suspect: Suspect) -> bool:
    eigenvalues = suspect.eigenvalues
    assert eigenvalues is not None
    return float(eigenvalues[0]) >= (1 - _FLAT) * float(eigenvalues[-1])


RULE = Rule(
    title="Modules that look untrained",
    evidence="The distance from a random spectrum (`null_distance`) is at most 3.5 standard deviations above "
    "what a random matrix of the shape has, the largest eigenvalue at most 4 Tracy-Widom units "
    "above the Marchenko-Pastur edge, and the norms of rows and of columns vary no more than those "
    "of independent elements (4 standard errors). At least 16 eigenvalues, no low-rank updates, no "
    "differences from a base. An error inside numbered layers; only worth knowing outside them "
    "(unused poolers and heads); a warning if most of the model is so.",
    meaning="These weights were never trained, or were initialised again when the checkpoint was loaded and saved: "
    "missing keys, a renamed tensor, a layer that was added.",
    caveat="Weights that training has moved by less than the width of their noise look random too, and the "
    "rule does not know whether it was meant.",
    action="Compare the names of the checkpoint with those that the model expects, read the loader's list of missing"
    " keys, and see whether the parameters are frozen.",
    sources=(
        "Marchenko and Pastur 1967",
        "Johnstone 2001 (the largest eigenvalue)",
        "Martin and Mahoney 2021, JMLR 22(165): 'random-like' as the first phase of training",
    ),
    find=_find,
    order=20,
    after=frozenset({"dead", "channel"}),
)
