"""An alpha in words."""

from __future__ import annotations

from esdtool.analysis.document import Analysis, ModuleResult

_SIGNIFICANT = 2.0
"""Standard errors between an alpha and the untrained one before they count as different."""


def verdict(module: ModuleResult, fit: str) -> str:
    """What a module's alpha says.

    With the estimator `ks` the literature's limits apply (2 and 6, Martin and Mahoney 2021). The other estimators'
    alphas have no such scale: they are compared with the alpha of an untrained matrix of the same shape.
    """
    if not module.ok or module.alpha is None:
        return module.status
    if fit in ("ks", "powerlaw") and module.rank is None:
        if module.alpha < 2:
            return "over-trained"
        return "under-trained" if module.alpha > 6 else "heavy-tailed"
    if module.rank is not None:
        return f"of rank {module.rank}"  # no random matrix to compare with
    if module.mp_alpha is None or module.alpha_stderr is None:
        return ""
    distance = (module.alpha - module.mp_alpha) / module.alpha_stderr
    if distance < -_SIGNIFICANT:
        return "heavy-tailed"
    return "lighter than random" if distance > _SIGNIFICANT else "like random"


def closing_words(analysis: Analysis) -> str:
    """The analysis in one or two sentences."""
    summary = analysis.summary
    if summary.mean_alpha is None:
        return "No module could be scored."
    alphas = {module.name: module.alpha for module in analysis.scored}

    def named(names: tuple[str, ...]) -> str:
        return ", ".join(f"{name} ({alphas[name]:.2f})" for name in names)

    words = f"Heaviest tails: {named(summary.most_heavy_tailed)}."
    if summary.num_scored > 1:
        words += f" Lightest: {named(summary.least_heavy_tailed)}."
    tally: dict[str, int] = {}
    for module in analysis.scored:
        word = verdict(module, analysis.settings.fit[0])
        tally[word] = tally.get(word, 0) + 1
    counts = ", ".join(f"{count} {word}" for word, count in sorted(tally.items(), key=lambda item: -item[1]) if word)
    unscored = summary.num_modules - summary.num_scored
    left = f", {unscored} not scored" if unscored else ""
    scored = f"Mean alpha {summary.mean_alpha:.2f} over {summary.num_scored} modules ({counts}{left})."
    return " ".join([scored, *filter(None, [_estimated(analysis)]), words])


def _estimated(analysis: Analysis) -> str | None:
    """How many alphas are estimates, and how good; None if all are exact."""
    intervals = [module.alpha_ci for module in analysis.scored if module.alpha_ci is not None]
    if not intervals:
        return None
    widest = max((high - low) / 2 for low, high in intervals)
    count = f"{len(intervals)} of {analysis.summary.num_modules} modules"
    return f"{count} are estimated (slq): 95 % intervals of alpha up to ±{widest:.1g}."
