"""Say which setting of several runs is ahead, as far as their seeds can tell."""

from __future__ import annotations

from esdtool.comparison.paired import paired
from esdtool.comparison.runs import ComparisonTable, RunRow, SettingRow
from esdtool.support.numbers import error_decimals


def leading_words(table: ComparisonTable) -> str:
    """Return a sentence on the two settings with the lowest mean, without its full stop.

    A winner is named only where the 95 % interval of the difference, paired by seed, leaves out zero. The interval is
    for these two settings alone: of many settings the best of all is ahead by chance more often.
    """
    best, *others = table.settings
    if not others:
        return f"one setting, {best.label}, so there is nothing to compare"
    second = others[0]
    found = paired(second.label, _finals(table, best), _finals(table, second))
    if found is None:
        return (
            f"{best.label} has the lowest mean, {second.label} the next; they share fewer than two seeds, which cannot "
            "tell a difference from chance"
        )
    decimals = error_decimals(found.standard_error)
    interval = f"{found.low:+.{decimals}f} to {found.high:+.{decimals}f}"
    if found.low <= 0 <= found.high:
        return (
            f"no difference that these seeds can tell from chance between the two lowest, {best.label} and "
            f"{second.label}: {interval} (95 % of {found.seeds} seeds)"
        )
    return (
        f"{best.label} is ahead of {second.label} by more than chance: {interval} "
        f"(95 % of {found.seeds} seeds, for these two alone)"
    )


def _finals(table: ComparisonTable, setting: SettingRow) -> dict[int, float]:
    return {
        row.seed: row.final_perplexity
        for row in table.runs
        if _is_of(row, setting) and row.seed in setting.seeds and (row.step >= row.steps or _none_is_done(table))
    }


def _is_of(row: RunRow, setting: SettingRow) -> bool:
    return row.policy == setting.policy and row.setting == setting.setting


def _none_is_done(table: ComparisonTable) -> bool:
    return all(row.step < row.steps for row in table.runs)
