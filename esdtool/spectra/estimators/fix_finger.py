"""`fix-finger`: `ks` with xmin near the peak of the spectrum (TempBalance, arXiv 2312.00359)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from esdtool.spectra.estimator import Estimator
from esdtool.spectra.estimators.ks import ks_fit
from esdtool.spectra.tail import TailFit, ascending

FIX_FINGER_BINS = 100
"""Bins of the histogram of log10(lambda) whose fullest one is the peak."""


def fix_finger_fit(eigenvalues: npt.ArrayLike, *, bound: Literal["linear", "legacy"] = "linear") -> TailFit:
    """`ks_fit` with xmin near the peak of the spectrum ("fix fingers", TempBalance, arXiv 2312.00359).

    The peak is the left edge of the fullest of 100 bins of log10(lambda), and xmin must lie in [0.95, 1.5] times the
    peak. With `bound="legacy"` the lower end is log10(0.95 peak), compared with linear eigenvalues: a mistake of
    the public code, offered so that numbers published with it can be reproduced.

    Raises:
        ValueError: as `ks_fit` does.
    """
    ordered = ascending(eigenvalues)
    positive = ordered[ordered > 0]
    if positive.size < 2:
        raise ValueError(f"a tail fit needs at least two positive eigenvalues, not {positive.size}")
    counts, edges = np.histogram(np.log10(positive), bins=FIX_FINGER_BINS)
    peak = 10.0 ** float(edges[int(np.argmax(counts))])
    low = 0.95 * peak if bound == "linear" else math.log10(0.95 * peak)
    return ks_fit(ordered, window=(low, 1.5 * peak))


ESTIMATOR = Estimator(
    fit=lambda eigenvalues, options: fix_finger_fit(eigenvalues, bound=options.fix_finger_bound),
    options=("fix_finger_bound",),
)
