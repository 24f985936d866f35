"""`fix-finger-legacy`: `fix-finger` with the window of the public code, whatever `--fix-finger-bound` says.

TempBalance, AlphaPruning and AlphaLoRA published their numbers with it.
"""

from __future__ import annotations

from esdtool.spectra.estimator import Estimator
from esdtool.spectra.estimators.fix_finger import fix_finger_fit

ESTIMATOR = Estimator(fit=lambda eigenvalues, _: fix_finger_fit(eigenvalues, bound="legacy"))
