"""`outlier`: a layer that differs from its neighbours of the same role."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import log10
from statistics import median

from esdtool.analysis.finding import Evidence, Severity
from esdtool.analysis.module_record import ModuleResult
from esdtool.findings.case import Case
from esdtool.findings.rule import Found, Rule

_DEVIATION = 8.0
"""Robust standard deviations of the residuals of a role."""

_EFFECT = 0.7
"""Least difference from the neighbours, in powers of ten: a factor of 5 in sums of squares."""

_FEWEST = 6
"""Layers that a role needs."""

_REACH = 2
"""Layers to either side whose median is expected of a layer."""

_SCALE = 1.4826
"""Standard deviations of a normal law in its median absolute deviation."""

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class _Measure:
    words: str
    severity: Severity
    log10: Callable[[ModuleResult], float | None]


_MEASURES = (
    _Measure(words="squared Frobenius norm (log10)", severity=Severity.WARNING, log10=lambda module: module.log_norm),
    _Measure(
        words="squared spectral norm (log10)", severity=Severity.INFO, log10=lambda module: module.log_spectral_norm
    ),
    _Measure(
        words="stable rank (log10)",
        severity=Severity.INFO,
        log10=lambda module: None if module.stable_rank is None else log10(module.stable_rank),
    ),
)


@dataclass(frozen=True, kw_only=True)
class _Outlier:
    module: ModuleResult
    measure: _Measure
    value: float
    expected: float
    spread: float

    @property
    def deviation(self) -> float:
        return abs(self.value - self.expected) / max(self.spread, 1e-3)


def _find(case: Case) -> Iterator[Found]:
    by_role: dict[tuple[object, ...], list[ModuleResult]] = defaultdict(list)
    for suspect in case:
        module = suspect.result
        if module.ok and module.layer is not None and module.rank is None and module.expert is None:
            stack = module.name.split(f".{module.layer}.", 1)[0]
            by_role[stack, module.role, module.shape].append(module)
    outliers: list[_Outlier] = []
    for modules in by_role.values():
        in_depth = sorted(modules, key=lambda module: module.layer or 0)
        for measure in _MEASURES:
            outliers += _outliers(in_depth, measure)
    grave = {outlier.module.name for outlier in outliers if outlier.measure.severity is Severity.WARNING}
    for severity, group in (
        (Severity.WARNING, [outlier for outlier in outliers if outlier.module.name in grave]),
        (Severity.INFO, [outlier for outlier in outliers if outlier.module.name not in grave]),
    ):
        if group:
            yield _found(case, severity, sorted(group, key=lambda outlier: -abs(outlier.value - outlier.expected)))


def _found(case: Case, severity: Severity, outliers: Sequence[_Outlier]) -> Found:
    return Found(
        severity=severity,
        modules=tuple(dict.fromkeys(outlier.module.name for outlier in outliers)),
        evidence=tuple(
            Evidence(
                measure=outlier.measure.words,
                module=outlier.module.name,
                value=outlier.value,
                expected=outlier.expected,
                expected_spread=outlier.spread,
                expected_of="layers beside it",
            )
            for outlier in outliers[:_SHOWN]
        ),
        command=case.command(outliers[0].module.name, "--html report.html"),
    )


def _outliers(modules: Sequence[ModuleResult], measure: _Measure) -> Iterator[_Outlier]:
    """Yield the layers whose residual from the median of their neighbours stands out in the role."""
    known = [(module, value) for module in modules if (value := measure.log10(module)) is not None]
    if len(known) < _FEWEST:
        return
    values = [value for _, value in known]
    expected = [
        median([*values[max(0, place - _REACH) : place], *values[place + 1 : place + 1 + _REACH]])
        for place in range(len(values))
    ]
    residuals = [value - middle for value, middle in zip(values, expected, strict=True)]
    spread = _SCALE * median(map(abs, residuals))
    # The first and the last layer differ from all others in sound models, and have neighbours on one side only.
    for (module, value), middle, residual in list(zip(known, expected, residuals, strict=True))[1:-1]:
        if abs(residual) >= max(_EFFECT, _DEVIATION * spread):
            yield _Outlier(module=module, measure=measure, value=value, expected=middle, spread=spread)


RULE = Rule(
    title="A layer unlike its neighbours",
    evidence="Over the layers of one role and shape (6 at least), the logarithm of the Frobenius norm, the spectral "
    "norm or the stable rank differs from the median of the two layers on either side by 0.7 (a factor of "
    "5), and by 8 robust standard deviations of such differences in the role. Experts, and the first and "
    "the last layer, are left out. The Frobenius norm makes a warning, the others are worth knowing.",
    meaning="The layer was trained, initialised, scaled or converted in another way than the others, or it began to "
    "diverge.",
    caveat="The first and the last layers of good models differ from the rest, sometimes by as much; depth alone is "
    "no fault.",
    action="Look at the module's spectrum beside its neighbours', and at the same layer in an earlier checkpoint.",
    sources=("Iglewicz and Hoaglin 1993 (robust z-scores)", "limits set by this project, see the calibration"),
    find=_find,
    order=35,
    after=frozenset({"dead", "channel", "duplicate", "untrained", "rank"}),
)
