"""`lora-spike`: low-rank updates that use one of their directions."""

from __future__ import annotations

from collections.abc import Iterator

from esdtool.analysis.finding import Evidence, Severity
from esdtool.findings.case import Case, Suspect
from esdtool.findings.rule import Found, Rule

_SHARE = 0.9
"""Share of the squared norm in the largest direction."""

_LEAST_RANK = 4

_SHOWN = 3


def _find(case: Case) -> Iterator[Found]:
    updates = [(suspect, share) for suspect in case if (share := _share_of_first(suspect)) is not None]
    spikes = sorted((pair for pair in updates if pair[1] >= _SHARE), key=lambda pair: -pair[1])
    if spikes:
        yield Found(
            severity=Severity.INFO,
            modules=tuple(suspect.name for suspect, _ in spikes),
            evidence=(
                Evidence(measure=f"updates that are a rank-one spike, of {len(updates)}", value=len(spikes)),
                *(
                    Evidence(
                        measure=f"share of the squared norm in one of {suspect.result.num_eigs} directions",
                        module=suspect.name,
                        value=share,
                        expected=1 / suspect.result.num_eigs,
                        expected_of="equal directions",
                    )
                    for suspect, share in spikes[:_SHOWN]
                ),
            ),
        )


def _share_of_first(suspect: Suspect) -> float | None:
    eigenvalues, rank = suspect.eigenvalues, suspect.result.rank
    if rank is None or rank < _LEAST_RANK or eigenvalues is None or not eigenvalues[-1] > 0:
        return None
    return float(eigenvalues[-1] / eigenvalues.sum())


RULE = Rule(
    title="Low-rank updates that are rank-one spikes",
    evidence="Of an update of rank 4 or more, one direction has at least 90 % of the squared norm. The share is exact.",
    meaning="The adapter uses one of its directions: its rank is larger than its task needs, or its learning rate is"
    " so large that the first direction grew before the others began.",
    caveat="A narrow task may need one direction only. The share says nothing about the quality of the adapter.",
    action="Try a smaller rank, or a smaller learning rate for the second factor, and compare the loss.",
    sources=(
        "Hu and others 2021, arXiv 2106.09685 (LoRA, section 7: rank needed)",
        "Shuttleworth and others 2024, arXiv 2410.21228 (directions that fine-tuning adds)",
    ),
    find=_find,
    order=65,
    after=frozenset({"dead"}),
)
