"""The settings of an analysis in words, the same in every report."""

from __future__ import annotations

from dataclasses import dataclass

from esdtool.analysis.document import Settings


@dataclass(frozen=True, kw_only=True)
class SettingInWords:
    """One setting that the numbers depend on."""

    term: str
    values: tuple[str, ...]
    """Usually one; several regular expressions stand apart."""
    is_usual: bool = False
    """Whether a report in one line may leave it out."""
    is_code: bool = False
    """Whether the values are regular expressions of the user."""

    @property
    def text(self) -> str:
        """The setting as plain text."""
        return f"{self.term} {' '.join(self.values)}"


def settings_in_words(settings: Settings) -> list[SettingInWords]:
    """List the settings that the numbers depend on; those of estimators that were not used are left out."""
    found = [_setting("alpha by", ", ".join(settings.fit))]
    if "hill" in settings.fit:
        found.append(_setting("k-fraction", f"{settings.k_fraction:g}"))
    if "fix-finger" in settings.fit:
        found.append(_setting("fix-finger bound", settings.fix_finger_bound))
    if settings.farms_rows is not None and settings.farms_ratio is not None:
        windows = f"{settings.farms_windows} windows per dimension"
        found.append(_setting("farms", f"{settings.farms_rows} rows, ratio {settings.farms_ratio:g}, {windows}"))
    found.append(_setting("min-eigs", str(settings.min_eigs)))
    found.append(_setting("spectrum", settings.spectrum + (", float32 allowed" if settings.fast else "")))
    if settings.vectors:
        found.append(_setting("singular vectors", "yes, in float64"))
    if settings.distances:
        vectors = f"below {settings.intruder_similarity:g}, of {settings.intruder_vectors} vectors"
        found.append(_setting("intruders", vectors))
    if settings.per_head:
        found.append(_setting("attention heads", "each"))
    split = "split" if settings.split_fused else "not split"
    found.append(SettingInWords(term="fused projections", values=(split,), is_usual=settings.split_fused))
    if settings.sample_layers is not None:
        found.append(_setting("sample of layers", f"{settings.sample_layers}, evenly by depth"))
    for term, patterns in (("include", settings.include), ("exclude", settings.exclude)):
        if patterns:
            found.append(SettingInWords(term=term, values=patterns, is_code=True))
    return found


def left_to_files(settings: Settings) -> str | None:
    """Say where the results of several checkpoints are that no table over steps shows; None if there are none."""
    asked = [
        words
        for words, is_asked in (("singular vectors", settings.vectors), ("attention heads", settings.per_head))
        if is_asked
    ]
    if not asked:
        return None
    words = " and ".join(asked)
    return f"{words.capitalize()}: each checkpoint's are in --json and --csv; one checkpoint at a time has tables."


def _setting(term: str, value: str) -> SettingInWords:
    return SettingInWords(term=term, values=(value,))
