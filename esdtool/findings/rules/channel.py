"""`channel`: one row or column that carries a matrix."""

from __future__ import annotations

from collections.abc import Iterator

from esdtool.analysis.finding import Evidence, Severity
from esdtool.findings.case import Case, Suspect
from esdtool.findings.rule import Found, Rule
from esdtool.spectra.elements import ChannelStatistics

_SHARE = 0.15
"""Share of the matrix's sum of squares that one channel must have."""

_RATIO = 10.0
"""So many times the share that all channels would have if they were equal."""

_OVER_UPPER = 12.0
"""So many times the sum of squares of the channel at the 95th percentile."""

_WHOLE = 0.9
"""Share from which on hardly anything else is left, and that no sound model at hand comes near."""

_FEWEST = 20
"""Channels of which one can stand out."""

_ONE = 0.9
"""Share of a channel's squared weights from which one element is what makes it large."""

_SHOWN = 3


def _find(case: Case) -> Iterator[Found]:
    found = [(suspect, side) for suspect in case for side in _sides(suspect) if _carries(side[1])]
    if not found:
        return
    found.sort(key=lambda pair: -pair[1][1].largest_share)
    worst = found[0][1][1].largest_share
    yield Found(
        severity=Severity.WARNING if worst >= _WHOLE else Severity.INFO,
        modules=tuple(dict.fromkeys(suspect.name for suspect, _ in found)),
        evidence=tuple(
            Evidence(
                measure=f"share of the squared weights in {kind} {channels.largest}"
                + (", almost all of it in one element" if _is_one_element(suspect, kind, channels) else ""),
                module=suspect.name,
                value=channels.largest_share,
                expected=1 / channels.count,
                expected_of=f"equal {kind}s",
            )
            for suspect, (kind, channels) in found[:_SHOWN]
        ),
        command=case.command(found[0][0].name, "--html report.html"),
    )


def _is_one_element(suspect: Suspect, kind: str, channels: ChannelStatistics) -> bool:
    """Tell whether a channel is large for a single element, which `traps` of the module names."""
    traps, norm = suspect.result.traps, suspect.result.frobenius_norm
    if traps is None or not traps.elements or not norm or not suspect.is_matrix:
        return False
    element = traps.elements[0]
    place = element.row if kind == "row" else element.column
    return place == channels.largest and (element.value / norm) ** 2 >= _ONE * channels.largest_share


def _sides(suspect: Suspect) -> list[tuple[str, ChannelStatistics]]:
    elements = None if suspect.observation is None else suspect.observation.elements
    return [] if elements is None else [("row", elements.rows), ("column", elements.columns)]


def _carries(channels: ChannelStatistics) -> bool:
    share = channels.largest_share
    stands_out = share * channels.count >= _RATIO and channels.largest_over_upper >= _OVER_UPPER
    return channels.count >= _FEWEST and share >= _SHARE and stands_out


RULE = Rule(
    title="One channel carries the matrix",
    evidence="One row or column, of at least 20, has at least 15 % of the sum of squares, at least 10 times the "
    "share of equal rows (columns), and at least 12 times the sum of squares of the one at the 95th "
    "percentile. The share is exact. "
    "From 90 % on it is a warning: audio and vision models that work have channels of up to 82 %.",
    meaning="A channel of massive activations, or a row that diverged: rounding to 8 bits or fewer per tensor loses "
    "all other rows, and alpha and the ranks of the module describe this one channel.",
    caveat="Large language models grow a few such channels by themselves (attention sinks) and need them; that a row"
    " is large does not make it wrong.",
    action="Quantise the module per channel or keep it in 16 bits. If the row is not in an earlier checkpoint of the"
    " run, look for the step at which it grew.",
    sources=(
        "Sun, Chen, Kolter and Liu 2024, arXiv 2402.17762 (massive activations)",
        "Dettmers and others 2022, arXiv 2208.07339 (outlier features)",
        "limits set by this project, see the calibration",
    ),
    find=_find,
    order=24,
)
