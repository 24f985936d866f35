"""An analysis in a few numbers: means over the model, alpha by role and by depth, and the modules at both ends."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev

from esdtool.analysis.document import LayerSummary, RoleSummary, Summary
from esdtool.analysis.means import means_of
from esdtool.analysis.module_record import ModuleResult

_EXTREMES = 3


def summarize(modules: Sequence[ModuleResult], *, num_skipped: int) -> Summary:
    """Return the summary of all modules; those that were not scored are counted and otherwise left out.

    Roles stand in the order of their first module, layers in ascending order.
    """
    alphas = {module.name: module.alpha for module in modules if module.alpha is not None}
    ranked = sorted(alphas, key=lambda name: alphas[name])  # stable: the model's order among equals
    extremes = min(_EXTREMES, len(ranked) // 2) or len(ranked)
    return Summary(
        num_modules=len(modules),
        num_scored=len(alphas),
        num_skipped=num_skipped,
        mean_alpha=fmean(alphas.values()) if alphas else None,
        means=means_of(modules),
        by_role=tuple(_by_role(modules)),
        by_layer=tuple(_by_layer(modules)),
        most_heavy_tailed=tuple(ranked[:extremes]),
        least_heavy_tailed=tuple(reversed(ranked[len(ranked) - extremes :])),
    )


def _by_role(modules: Sequence[ModuleResult]) -> list[RoleSummary]:
    rows = []
    for role in dict.fromkeys(module.role for module in modules):
        members = [module for module in modules if module.role == role]
        alphas = [module.alpha for module in members if module.alpha is not None]
        nulls = [module.mp_alpha for module in members if module.mp_alpha is not None]
        if alphas:
            rows.append(
                RoleSummary(
                    role=role,
                    count=len(alphas),
                    mean_alpha=fmean(alphas),
                    std_alpha=pstdev(alphas),
                    min_alpha=min(alphas),
                    max_alpha=max(alphas),
                    mean_mp_alpha=fmean(nulls) if nulls else None,
                    means=means_of(members),
                )
            )
    return rows


def _by_layer(modules: Sequence[ModuleResult]) -> list[LayerSummary]:
    rows = []
    for layer in sorted({module.layer for module in modules if module.layer is not None}):
        alphas = [module.alpha for module in modules if module.layer == layer and module.alpha is not None]
        if alphas:
            rows.append(LayerSummary(layer=layer, count=len(alphas), mean_alpha=fmean(alphas)))
    return rows
