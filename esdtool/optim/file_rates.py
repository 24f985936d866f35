"""Multiply learning rates by the ratios of an assignment file, whatever the scheduler."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from esdtool.assignment.allocation import Allocation
from esdtool.assignment.reading import load_allocation, naming
from esdtool.errors import AssignmentError
from esdtool.optim import groups
from esdtool.optim.learning_rates import ScaledRates
from esdtool.optim.live_names import fitted
from esdtool.optim.parameters import live_model, resolve


def scale_by_file(model: nn.Module, optimizers: tuple[Optimizer, ...], path: str | PathLike[str]) -> dict[str, float]:
    """Make optimizers step with the file's ratios of their learning rates from now on.

    Args:
        model: the model that they train.
        optimizers: their groups are split where they need several rates.
        path: an assignment file of version 2 with learning rates.

    Returns:
        The ratio of each trained parameter that the file lists, by the parameter's first name.

    Raises:
        AssignmentError: if the file is invalid, holds no learning rates or does not fit the model.
    """
    document = load_allocation(Path(path))
    rates = document.rates if isinstance(document, Allocation) else None
    if rates is None:
        raise AssignmentError(f"{path}: holds no learning rates; make it with `esdtool assign --for learning-rate`")
    live = live_model(model)
    with naming(path):
        found = resolve(live, fitted(rates, model), strict=True, values="learning-rate ratios").decays
    held = groups.optimized(optimizers)
    ratios = {parameter: ratio for parameter, ratio in found.items() if parameter in held}
    if not ratios:
        raise AssignmentError(f"{path}: no optimizer holds a parameter that the file lists")
    scaled = ScaledRates(optimizers, by="the file's learning rates")
    for optimizer in optimizers:
        groups.split(
            optimizer,
            ratios.get,
            allowed=True,
            name_of=lambda parameter: live.names.get(parameter, ("?",))[0],
            values="learning rates",
        )
    scaled.set(ratios.get)
    return {live.names[parameter][0]: ratio for parameter, ratio in ratios.items()}
