"""Interpret alphas: verdicts as an enum, the conclusion of an analysis as a dataclass, and the words of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from esdtool.analysis.distances import intruder_words
from esdtool.analysis.document import Analysis
from esdtool.analysis.module_record import ModuleResult
from esdtool.support.words import counted

OVER_TRAINED_BELOW, UNDER_TRAINED_ABOVE = 2.0, 6.0
"""Limits of a well-trained layer by the estimator `ks` (Martin and Mahoney 2021)."""

FITS_WITH_LIMITS = frozenset({"ks", "powerlaw"})
"""Estimators for which those limits hold; `powerlaw` makes the fit of `ks`."""

_SIGNIFICANT = 2.0
"""Standard errors between an alpha and the untrained one before they count as different."""


class Verdict(StrEnum):
    """The verdict on the alpha of one module. The value is the verdict in words."""

    HEAVY_TAILED = "heavy-tailed"
    LIKE_RANDOM = "like random"
    LIGHTER_THAN_RANDOM = "lighter than random"
    OVER_TRAINED = "over-trained"
    UNDER_TRAINED = "under-trained"
    LOW_RANK = "of low rank"
    """There is no random matrix to compare a low-rank update with."""
    NO_NULL = ""
    """The alpha of an untrained matrix of the shape, or the standard error, is not known."""
    NOT_SCORED = "not scored"


def verdict(module: ModuleResult, fit: str) -> Verdict:
    """Judge a module's alpha.

    With the estimator `ks` the literature's limits apply (2 and 6, Martin and Mahoney 2021). The other estimators'
    alphas have no such scale: they are compared with the alpha of an untrained matrix of the same shape.

    Args:
        module: a module of an analysis.
        fit: the estimator of its alpha.
    """
    if not module.ok or module.alpha is None:
        return Verdict.NOT_SCORED
    if module.rank is not None:
        return Verdict.LOW_RANK
    if fit in FITS_WITH_LIMITS:
        return within_limits(module.alpha)
    if module.mp_alpha is None or module.alpha_stderr is None:
        return Verdict.NO_NULL
    distance = (module.alpha - module.mp_alpha) / module.alpha_stderr
    if distance < -_SIGNIFICANT:
        return Verdict.HEAVY_TAILED
    return Verdict.LIGHTER_THAN_RANDOM if distance > _SIGNIFICANT else Verdict.LIKE_RANDOM


def within_limits(alpha: float) -> Verdict:
    """Judge an alpha of the estimator `ks` by the literature's limits.

    >>> [within_limits(alpha).value for alpha in (1.7, 3.0, 6.5)]
    ['over-trained', 'heavy-tailed', 'under-trained']
    """
    if alpha < OVER_TRAINED_BELOW:
        return Verdict.OVER_TRAINED
    return Verdict.UNDER_TRAINED if alpha > UNDER_TRAINED_ABOVE else Verdict.HEAVY_TAILED


_TAIL_WORDS = {
    Verdict.HEAVY_TAILED: " from random",
    Verdict.NO_NULL: " from random",
    Verdict.LIKE_RANDOM: ", random tail",
    Verdict.LIGHTER_THAN_RANDOM: ", lighter tail",
}
"""What follows the distance from random in percent; a heavy tail is what is expected of it."""


def verdict_words(module: ModuleResult, fit: str) -> str:
    """Say how far a module is from random, in units that compare across shapes, and what its alpha adds to that.

    Where the distance is not known, the words are those of `alpha_words`.

    Args:
        module: a module of an analysis.
        fit: the estimator of its alpha.
    """
    words, distance = alpha_words(module, fit), distance_words(module)
    return words if distance is None else distance + _TAIL_WORDS.get(verdict(module, fit), f", {words}")


def distance_words(module: ModuleResult) -> str | None:
    """Say how far a module is from random, in percent; None where that is not known."""
    if module.null_distance is None or not module.ok:
        return None
    percent = 100 * module.null_distance
    return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.1f} %"


def alpha_words(module: ModuleResult, fit: str) -> str:
    """Say the verdict on an alpha: with the rank of a low-rank update, and with the reason why there is no score."""
    found = verdict(module, fit)
    if found is Verdict.NOT_SCORED:
        return module.status
    return f"of rank {module.rank}" if found is Verdict.LOW_RANK else found.value


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """The conclusion of an analysis."""

    mean_alpha: float | None
    """Mean over the scored modules; None if there are none."""
    num_modules: int
    num_scored: int
    tally: Mapping[str, int]
    """Scored modules by the words of their verdict, the most frequent first."""
    num_estimated: int
    """Modules whose alpha is estimated without eigenvalues."""
    widest: float
    """Half of the widest 95 % interval of an estimated alpha."""
    heaviest: tuple[tuple[str, float], ...]
    """Names and alphas of the modules with the heaviest tails, heaviest first."""
    sample_layers: int | None = None
    """Number of layers of a sample; None where all were analysed."""
    lightest: tuple[tuple[str, float], ...]
    """Names and alphas of the modules with the lightest tails, lightest first; empty where one module was scored."""

    @property
    def opening(self) -> str:
        """The conclusion in numbers, as one or two sentences that name no module."""
        if self.mean_alpha is None:
            return "No module could be scored."
        counts = ", ".join(f"{count} {words}" for words, count in self.tally.items())
        unscored = self.num_modules - self.num_scored
        left = f", {unscored} not scored" if unscored else ""
        sample = "" if self.sample_layers is None else f"A sample of {counted(self.sample_layers, 'layer')}. "
        scored = f"{sample}Mean alpha {self.mean_alpha:.2f} over {self.num_scored} modules ({counts}{left})."
        if not self.num_estimated:
            return scored
        return (
            f"{scored} {self.num_estimated} of {self.num_modules} modules are estimated (slq): "
            f"95 % intervals of alpha up to ±{self.widest:.1g}."
        )

    @property
    def text(self) -> str:
        """The whole conclusion as plain text: the opening, then the modules at both ends."""

        def named(modules: tuple[tuple[str, float], ...]) -> str:
            return ", ".join(f"{name} ({alpha:.2f})" for name, alpha in modules)

        parts = [self.opening]
        if self.heaviest:
            parts.append(f"Heaviest tails: {named(self.heaviest)}.")
        if self.lightest:
            parts.append(f"Lightest: {named(self.lightest)}.")
        return " ".join(parts)


def conclude(analysis: Analysis) -> Conclusion:
    """Draw the conclusion of an analysis."""
    summary = analysis.summary
    alphas = {module.name: module.alpha for module in analysis.scored if module.alpha is not None}

    def named(names: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
        return tuple((name, alphas[name]) for name in names if name in alphas)

    tally: dict[str, int] = {}
    for module in analysis.scored:
        words = alpha_words(module, analysis.settings.fit[0])
        if words:
            tally[words] = tally.get(words, 0) + 1
    intervals = [module.alpha_ci for module in analysis.scored if module.alpha_ci is not None]
    return Conclusion(
        mean_alpha=summary.mean_alpha,
        num_modules=summary.num_modules,
        num_scored=summary.num_scored,
        tally=dict(sorted(tally.items(), key=lambda item: -item[1])),
        num_estimated=len(intervals),
        sample_layers=analysis.settings.sample_layers,
        widest=max(((high - low) / 2 for low, high in intervals), default=0.0),
        heaviest=named(summary.most_heavy_tailed),
        lightest=named(summary.least_heavy_tailed) if summary.num_scored > 1 else (),
    )


def closing_words(analysis: Analysis) -> str:
    """Say the conclusion of an analysis in a few sentences."""
    found = [(module.name, module.distances) for module in analysis.modules]
    intruders = intruder_words(found, similarity=analysis.settings.intruder_similarity)
    return " ".join(filter(None, (conclude(analysis).text, intruders)))
