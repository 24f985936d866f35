"""`ks-limits`: alphas of the estimator `ks` outside the limits of the literature."""

from __future__ import annotations

from collections.abc import Iterator

from esdtool.analysis.finding import Evidence, Severity
from esdtool.analysis.module_record import ModuleResult, TailResult
from esdtool.analysis.verdict import FITS_WITH_LIMITS, OVER_TRAINED_BELOW, UNDER_TRAINED_ABOVE
from esdtool.findings.case import Case
from esdtool.findings.rule import Found, Rule

_SHOWN = 3


def _find(case: Case) -> Iterator[Found]:
    fits = [
        (suspect.result, fit)
        for suspect in case
        if suspect.result.rank is None and (fit := _fit(suspect.result)) is not None
    ]
    low = [(module, fit) for module, fit in fits if _excess(OVER_TRAINED_BELOW - fit.alpha, fit) > case.critical_z]
    high = [(module, fit) for module, fit in fits if _excess(fit.alpha - UNDER_TRAINED_ABOVE, fit) > case.critical_z]
    if low:
        low.sort(key=lambda pair: pair[1].alpha)
        yield _found(low, OVER_TRAINED_BELOW, "at least")
    if high:
        high.sort(key=lambda pair: -pair[1].alpha)
        yield _found(
            high,
            UNDER_TRAINED_ABOVE,
            "at most",
            title="Under-trained by ks",
            meaning="The tail is too light for a well-trained layer by Martin and Mahoney: it has not learned much "
            "yet, or the layer is wider than its task.",
            action="Train longer, or give these modules a larger learning rate than the others; "
            "compare with a run without.",
        )


def _found(pairs: list[tuple[ModuleResult, TailResult]], limit: float, words: str, **changes: str) -> Found:
    return Found(
        severity=Severity.INFO,
        modules=tuple(module.name for module, _ in pairs),
        evidence=tuple(
            Evidence(
                measure="alpha by ks",
                module=module.name,
                value=fit.alpha,
                uncertainty=fit.alpha_stderr,
                expected=limit,
                expected_of=f"a well-trained layer, {words}",
            )
            for module, fit in pairs[:_SHOWN]
        ),
        **changes,
    )


def _fit(module: ModuleResult) -> TailResult | None:
    return next((fit for name, fit in module.fits.items() if name in FITS_WITH_LIMITS and fit is not None), None)


def _excess(beyond: float, fit: TailResult) -> float:
    """Return how many standard errors an alpha lies beyond a limit."""
    return beyond / fit.alpha_stderr if fit.alpha_stderr else 0.0


RULE = Rule(
    title="Over-trained by ks",
    evidence="With `--fit ks` (or `powerlaw`), alpha is below 2, or above 6, by more standard errors than chance "
    "gives in any module of the model at a level of 1 % (Bonferroni). Other estimators have no such limits,"
    " and the rule is silent.",
    meaning="The tail is heavier than the theory expects of a well-trained layer: it may have memorised, or a few "
    "large elements carry it.",
    caveat="The limits come from vision and language models up to 2020 and are a rule of thumb; nobody has shown "
    "that a single module outside them harms a large language model. The standard error leaves out the choice"
    " of xmin.",
    action="See whether validation loss rises. A larger weight decay for these modules is what `esdtool assign` "
    "proposes; the evidence for it is on the page about the study.",
    sources=("Martin and Mahoney 2021, JMLR 22(165)", "Martin, Peng and Mahoney 2021, Nature Communications 12, 4122"),
    find=_find,
    order=70,
    after=frozenset({"dead", "untrained", "channel", "rank"}),
)
