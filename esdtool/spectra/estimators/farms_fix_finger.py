"""`farms-fix-finger`: `fix-finger-legacy` on pooled FARMS windows, which AlphaPruning with FARMS really uses.

The windows are those published for LLaMA: 2000 rows, square, up to 15 positions a dimension (arXiv 2506.06280,
HUST-AI-HYZ/FARMS, LLM_Pruning). A matrix with fewer rows has square windows of its short side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from esdtool.spectra.estimator import Estimator, SubMatrices
from esdtool.spectra.estimators import fix_finger_legacy
from esdtool.spectra.estimators.farms import farms_windows
from esdtool.spectra.options import ScoreOptions

if TYPE_CHECKING:
    import torch


def _cut(matrices: Sequence[torch.Tensor], options: ScoreOptions) -> list[torch.Tensor]:
    del options
    return farms_windows(matrices, rows=2000, ratio=1.0, windows=15)


ESTIMATOR = Estimator(fit=fix_finger_legacy.ESTIMATOR.fit, sub_matrices=SubMatrices(cut=_cut, options=()))
