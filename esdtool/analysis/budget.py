"""Choose the modules to estimate so that an analysis stays within a time (`--budget`)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import torch

from esdtool.analysis.plan import Plan
from esdtool.analysis.timing import calibrate, makespan
from esdtool.errors import UsageError
from esdtool.modules import WeightModule
from esdtool.spectra.slq import SMALLEST, estimate_tail
from esdtool.support.threads import single_blas_workers


def keep_within(plan: Plan, seconds: float) -> tuple[Plan, str | None]:
    """Return the plan with as few modules estimated as bring its predicted time below a budget.

    Reading and the cache of spectra are not counted. The prediction times a few matrices, about a second.

    Args:
        plan: from `make_plan`.
        seconds: wall-clock time of its computation.

    Returns:
        The plan, as it was if all fits in the budget exactly, and what the user should be told, if anything.

    Raises:
        UsageError: if the budget is not positive, or alpha is by another fit than `hill`.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"the budget must be a positive number of seconds, not {seconds:g}")
    plan.options.check_exact("--budget")
    plan.options.check_estimable("--budget")
    if plan.options.spectrum == "slq":
        return plan, None  # what can be estimated is
    calibration = calibrate(plan)
    exact = {module.name: calibration.of_module(module) for module in plan.selection.modules}
    before = makespan(list(exact.values()), plan.jobs)
    if before <= seconds:
        return plan, None
    chosen, after = choose(exact, _estimated_seconds(plan), seconds, jobs=plan.jobs)
    total = len(plan.selection.modules)
    short = "" if after <= seconds else f", more than the budget of {_seconds(seconds)}"
    if not chosen:
        return plan, (
            f"all {total} modules are computed exactly, which will take about {_seconds(before)}{short}: "
            f"none is large enough for an estimate to save time"
        )
    return replace(plan, estimated=frozenset(chosen)), (
        f"{len(chosen)} of {total} modules are estimated (slq), the most expensive ones: all exactly would take about "
        f"{_seconds(before)}, this about {_seconds(after)}{short or f' of the budget of {_seconds(seconds)}'}"
    )


def choose(
    exact: Mapping[str, float], estimated: Mapping[str, float], seconds: float, *, jobs: int
) -> tuple[list[str], float]:
    """Return the fewest of the most expensive modules to estimate, and the predicted time then.

    >>> choose({"a": 5.0, "b": 2.0, "c": 1.0}, {"a": 1.0, "b": 0.5}, 4.5, jobs=1)
    (['a'], 4.0)

    Args:
        exact: seconds of each module by its eigenvalues.
        estimated: seconds of those that can be estimated.
        seconds: the budget.
        jobs: modules worked on at a time.

    Returns:
        Names, the most expensive first, and seconds; more than the budget if even estimating all takes longer.
    """
    times = dict(exact)
    chosen: list[str] = []
    gains = [name for name in estimated if estimated[name] < exact[name]]
    for name in sorted(gains, key=lambda name: -exact[name]):
        if makespan(list(times.values()), jobs) <= seconds:
            break
        times[name] = estimated[name]
        chosen.append(name)
    return chosen, makespan(list(times.values()), jobs)


def _estimated_seconds(plan: Plan) -> dict[str, float]:
    """Predicted seconds of each module that can be estimated, in proportion to the elements of one that is timed."""
    able = [module for module in plan.selection.modules if _estimable(module)]
    if not able:
        return {}
    matrix = torch.randn(SMALLEST, SMALLEST, generator=torch.Generator().manual_seed(0))

    def time_one() -> float:
        start = time.perf_counter()
        estimate_tail(matrix, device=plan.device)
        return time.perf_counter() - start

    with single_blas_workers(1) as pool:
        pool.submit(time_one).result()  # the first call also loads libraries
        per_element = pool.submit(time_one).result() / matrix.numel()
    return {module.name: per_element * module.matrix_shape[0] * module.matrix_shape[1] for module in able}


def _estimable(module: WeightModule) -> bool:
    return module.rank is None and module.num_matrices == 1 and min(module.matrix_shape) >= SMALLEST


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
