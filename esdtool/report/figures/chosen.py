"""Choose the modules that get figures of their own, and the paths of these figures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from esdtool.analysis.document import Analysis
from esdtool.analysis.module_record import ModuleResult
from esdtool.errors import UsageError
from esdtool.report.figures.kind import FigureTarget, Material
from esdtool.report.figures.names import analysis_endings, distinct_parts
from esdtool.report.figures.style import make_folder, subject


class SaveModule(Protocol):
    """Draws the figure of one module, such as `save_esd`."""

    def __call__(
        self, path: Path, module: ModuleResult, eigenvalues: npt.NDArray[np.float64], *, subject: str, dpi: int
    ) -> Path:
        """Write the figure and return its path."""


def module_figures(kind: str, save: SaveModule, material: Material, target: FigureTarget) -> Iterator[Path]:
    """Draw the chosen modules of each analysis that has eigenvalues, in a folder of their own: there may be hundreds.

    Raises:
        UsageError: if a pattern of the material matches no module.
    """
    for ending, analysis in analysis_endings([found for found in material.analyses if found.esds]):
        folder = target.folder / f"{kind}{ending}"
        modules = chosen_modules(analysis, material.modules)
        for module, name in zip(modules, distinct_parts([module.name for module in modules]), strict=True):
            make_folder(folder)
            path = folder / f"{name}.{target.suffix}"
            yield save(path, module, analysis.esds[module.name], subject=subject(analysis), dpi=target.dpi)


def chosen_modules(analysis: Analysis, patterns: Sequence[str]) -> list[ModuleResult]:
    """Choose the modules that match one of the patterns; without any, the heaviest, the median and the lightest tail.

    Raises:
        UsageError: if a pattern is no regular expression, or matches no scored module.
    """
    scored = [module for module in analysis.scored if module.name in analysis.esds]
    if not patterns:
        ranked = sorted(scored, key=lambda module: module.alpha or 0.0)
        places = dict.fromkeys((0, len(ranked) // 2, len(ranked) - 1)) if ranked else {}
        return [ranked[place] for place in places]
    found: dict[str, ModuleResult] = {}
    for pattern in patterns:
        try:
            matches = [module for module in scored if re.search(pattern, module.name)]
        except re.error as error:
            raise UsageError(f"--module {pattern}: not a regular expression: {error}") from error
        if not matches:
            raise UsageError(f"--module {pattern}: matches no scored module of {analysis.source.checkpoint}")
        found |= {module.name: module for module in matches}
    return list(found.values())
