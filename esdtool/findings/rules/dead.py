"""`dead`: modules, rows or columns whose weights are all zero."""

from __future__ import annotations

from collections.abc import Iterator

from esdtool.analysis.finding import Evidence, Severity
from esdtool.findings.case import Case, Suspect
from esdtool.findings.rule import Found, Rule
from esdtool.spectra.elements import ChannelStatistics
from esdtool.spectra.scoring import ALL_ZERO

_SHOWN = 3


def _find(case: Case) -> Iterator[Found]:
    if case.is_difference:
        return  # what a fine-tune leaves alone has a difference of zero
    whole = [suspect for suspect in case if suspect.result.status == ALL_ZERO]
    if updates := [suspect for suspect in whole if suspect.result.rank is not None]:
        yield Found(
            severity=Severity.WARNING,
            modules=tuple(suspect.name for suspect in updates),
            evidence=(_count("updates that are zero", updates),),
            title="Adapter updates that are zero",
            meaning="The adapter was never trained here: one of its factors starts at zero and still is.",
            caveat="An adapter that was saved before its first step looks the same.",
            action="See that the optimizer has the adapter's parameters, and that they get gradients.",
        )
    if matrices := [suspect for suspect in whole if suspect.result.rank is None]:
        yield Found(
            severity=Severity.WARNING,
            modules=tuple(suspect.name for suspect in matrices),
            evidence=(_count("modules whose elements are all zero", matrices),),
            title="Modules that are zero",
        )
    partial = [(suspect, channels) for suspect in case if (channels := _zero_channels(suspect)) is not None]
    if partial:
        partial.sort(key=lambda pair: -pair[1][1].num_zero / pair[1][1].count)
        yield Found(
            severity=Severity.WARNING,
            modules=tuple(suspect.name for suspect, _ in partial),
            evidence=tuple(
                Evidence(
                    measure=f"zero {kind} (of {channels.count}, first index {channels.first_zero})",
                    module=suspect.name,
                    value=channels.num_zero,
                    expected=0,
                    expected_of="a dense matrix",
                )
                for suspect, (kind, channels) in partial[:_SHOWN]
            ),
            command=case.command(partial[0][0].name, "--spectrum svd"),
        )


def _count(measure: str, suspects: list[Suspect]) -> Evidence:
    return Evidence(measure=measure, value=len(suspects), expected=0, expected_of="a trained model")


def _zero_channels(suspect: Suspect) -> tuple[str, ChannelStatistics] | None:
    """Return the side with the larger share of zero channels; None without any."""
    elements = None if suspect.observation is None else suspect.observation.elements
    if elements is None:
        return None
    sides = [("rows", elements.rows), ("columns", elements.columns)]
    worst = max(sides, key=lambda side: side[1].num_zero / side[1].count)
    return worst if worst[1].num_zero else None


RULE = Rule(
    title="Dead rows or columns",
    evidence="All elements of the module, or of one of its rows or columns, are zero, or hold less than 1e-10 of the"
    " median row's (column's) sum of squares. The count is exact.",
    meaning="A unit that gets no gradient and that weight decay has removed, padding to a round size, or structured "
    "pruning. A whole matrix of zeros adds nothing to its residual stream.",
    caveat="Pruning and padding are meant. A projection that starts at zero on purpose is zero before the first step.",
    action="If nobody pruned: look for units that never fire, and for tensors that were created and not loaded. "
    "Otherwise the rows can be cut out, which makes the model smaller and changes no output.",
    sources=("exact count over the elements",),
    find=_find,
    order=30,
)
