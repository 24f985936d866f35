"""How long an analysis will take, from a spectrum timed on this machine."""

from __future__ import annotations

import time

import torch

from esdtool.engine import Plan
from esdtool.modules import WeightModule
from esdtool.scoring import cost, score_matrices

_ORDER = 768
"""Order of the matrix that is timed: large enough for the rate of a solver, small enough for a tenth of a second."""


def estimate_seconds(plan: Plan) -> float:
    """Predicted wall-clock seconds of a plan: its cost over the rate measured on one random matrix."""
    shape = (_ORDER, _ORDER)
    module = WeightModule(name="", parameter="", role="", layer=None, shape=shape, dtype="float32")
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        score_matrices([matrix], plan.options, device=plan.device)  # the first call also loads libraries
        start = time.perf_counter()
        score_matrices([matrix], plan.options, device=plan.device)
        seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    return plan.cost * seconds / cost(module) / plan.jobs
