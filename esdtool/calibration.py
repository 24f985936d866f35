"""How long an analysis will take, from a spectrum timed on this machine."""

from __future__ import annotations

import time

import torch

from esdtool.engine import Plan
from esdtool.modules import WeightModule
from esdtool.scoring import cost, score_matrices
from esdtool.threads import single_blas_workers

_ORDER = 768
"""Order of the matrix that is timed: large enough for the rate of a solver, small enough for a tenth of a second."""


def estimate_seconds(plan: Plan) -> float:
    """Predicted wall-clock seconds of a plan: its cost over the rate measured on one random matrix."""
    shape = (_ORDER, _ORDER)
    module = WeightModule(name="", parameter="", role="", layer=None, shape=shape, dtype="float32")
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def seconds_of_one() -> float:
        start = time.perf_counter()
        score_matrices([matrix], plan.options, device=plan.device)
        return time.perf_counter() - start

    with single_blas_workers(1) as pool:
        pool.submit(seconds_of_one).result()  # the first call also loads libraries
        seconds = pool.submit(seconds_of_one).result()
    return plan.cost * seconds / cost(module) / plan.jobs
