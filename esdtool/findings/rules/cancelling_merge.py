"""`cancelling-merge`: merged models whose task vectors cancel."""

from __future__ import annotations

from collections.abc import Iterator

from esdtool.analysis.finding import Evidence, Severity
from esdtool.analysis.task_vectors import TaskVectors
from esdtool.findings.case import Case, Suspect
from esdtool.findings.rule import Found, Rule

_RETAINED = 0.8
"""Norm of the sum over that of orthogonal task vectors below which they cancel: 36 % of the squared norm is lost."""

_SHOWN = 3


def _find(case: Case) -> Iterator[Found]:
    found = []
    for suspect in case:
        tasks = _tasks(suspect)
        retained = None if tasks is None else tasks.retained
        if tasks is not None and retained is not None and _cancels(retained, tasks, case):
            found.append((suspect, tasks, retained))
    if found:
        found.sort(key=lambda item: item[2])
        yield Found(
            severity=Severity.WARNING,
            modules=tuple(suspect.name for suspect, _, _ in found),
            evidence=tuple(
                Evidence(
                    measure=f"norm of the sum of {len(tasks.norms)} task vectors over that of orthogonal ones",
                    module=suspect.name,
                    value=retained,
                    expected=1,
                    expected_spread=tasks.chance,
                    expected_of="independent changes",
                )
                for suspect, tasks, retained in found[:_SHOWN]
            ),
        )


def _tasks(suspect: Suspect) -> TaskVectors | None:
    return None if suspect.observation is None else suspect.observation.tasks


def _cancels(retained: float, tasks: TaskVectors, case: Case) -> bool:
    return retained <= _RETAINED and 1 - retained > case.critical_z * tasks.chance


RULE = Rule(
    title="Task vectors that cancel",
    evidence="With `--base` and the parents of the merge (`--merged-from`, twice or more): the norm of the sum of "
    "the parents' differences from the base, over the root of the sum of their squared norms, is at most "
    "0.8, and lower than chance gives independent differences in any module of the model at a level of 1 % "
    "(Bonferroni).",
    meaning="The parents moved these weights against each other, and an average of them undoes what each has learned.",
    caveat="It compares directions in the space of weights: a merge that keeps less of them can still do both tasks,"
    " and the weights of the merge, and signs that it dropped (TIES), are not taken into account.",
    action="Merge by a method that resolves signs (TIES, DARE), leave a parent out, or weight the parents "
    "differently in these modules; then measure each task.",
    sources=(
        "Ilharco and others 2023, arXiv 2212.04089 (task vectors and their cosines)",
        "Yadav and others 2023, arXiv 2306.01708 (interference of signs, TIES)",
    ),
    find=_find,
    order=32,
)
