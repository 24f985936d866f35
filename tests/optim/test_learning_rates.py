"""Multiples of learning rates: exactly ratio times what the scheduler alone would say, whatever the scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as schedulers
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from esdtool.errors import AssignmentError
from esdtool.optim.learning_rates import ScaledRates

STEPS = 12

TORCH: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.3, total_iters=4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.2, total_iters=7),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=9, power=2),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 1e-1, step_size_up=4, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=STEPS + 1, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, min_lr=2e-3),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, total_iters=4), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=6),
}
EXTRA: dict[str, dict[str, Any]] = {
    "warmup_stable_decay": {"num_decay_steps": 4},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.05},
}


def _hugging_face(kind: SchedulerType) -> Callable[[Any], Any]:
    return lambda optimizer: get_scheduler(
        kind, optimizer, num_warmup_steps=3, num_training_steps=STEPS, scheduler_specific_kwargs=EXTRA.get(kind.value)
    )


# The greedy scheduler searches by the losses of its own optimizer: it does not set one rate for each step.
HUGGING_FACE = {kind.value: _hugging_face(kind) for kind in SchedulerType if "greedy" not in kind.value}
ALL = TORCH | HUGGING_FACE


class Probe(torch.optim.SGD):
    """Remembers the rate of each group in every step, and calls a step inside a step, as subclasses do."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: list[list[float]] = []

    def step(self, closure: Any = None) -> None:
        self.seen.append([float(group["lr"]) for group in self.param_groups])
        super().step(closure)


def _probe(*, tensor: bool) -> Probe:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in (0.1, 0.02, 0.3)]
    if tensor:
        groups = [{**group, "lr": torch.tensor(group["lr"], dtype=torch.float64)} for group in groups]
    return Probe(groups, lr=0.1, momentum=0.9)


def _train(make: Callable[[Any], Any], ratios: list[list[float]] | None, *, tensor: bool, skipped: int) -> Probe:
    """Step with ratios that change at each step; one step is left out, as a scaler of gradients leaves it out."""
    optimizer = _probe(tensor=tensor)
    rates = ScaledRates([optimizer], by="this test") if ratios is not None else None
    scheduler = make(optimizer)
    for step in range(STEPS):
        if rates is not None:
            assert ratios is not None
            now = {
                id(group["params"][0]): ratio for group, ratio in zip(optimizer.param_groups, ratios[step], strict=True)
            }
            rates.set(lambda parameter, now=now: now[id(parameter)])
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(2)
        if step != skipped:
            optimizer.step()
        if "metrics" in inspect.signature(scheduler.step).parameters:
            scheduler.step(1.0)
        else:
            scheduler.step()
    return optimizer


def test_no_scheduler_of_torch_is_forgotten() -> None:
    known = {
        name
        for name, value in vars(schedulers).items()
        if isinstance(value, type) and issubclass(value, schedulers.LRScheduler) and not name.startswith("_")
    }
    assert known - {"LRScheduler"} <= set(TORCH)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_the_rate_is_the_ratio_times_the_rate_without(name: str, data: st.DataObject) -> None:
    one = st.one_of(st.just(1.0), st.floats(min_value=0.0, max_value=8.0))
    ratios = data.draw(st.lists(st.lists(one, min_size=3, max_size=3), min_size=STEPS, max_size=STEPS))
    tensor, skipped = data.draw(st.booleans()), data.draw(st.integers(1, STEPS))
    # Some schedulers put a number in the place of a tensor; both runs see the same.
    plain = _train(ALL[name], None, tensor=tensor, skipped=skipped)
    scaled = _train(ALL[name], ratios, tensor=tensor, skipped=skipped)
    used = [row for step, row in enumerate(ratios) if step != skipped]
    assert scaled.seen == [
        [ratio * rate for ratio, rate in zip(row, rates, strict=True)]
        for row, rates in zip(used, plain.seen, strict=True)
    ]
    assert [float(group["lr"]) for group in scaled.param_groups] == [float(group["lr"]) for group in plain.param_groups]


def test_a_tensor_that_several_groups_share() -> None:
    """As torch makes it where the rate is given once for all groups."""
    rate = torch.tensor(0.1)
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [each]} for each in parameters], lr=rate, capturable=True, foreach=False)
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    rates = ScaledRates([optimizer], by="this test")
    rates.set({parameters[0]: 2.0, parameters[1]: 3.0}.get)
    assert [rates.rate(group) for group in optimizer.param_groups] == pytest.approx([0.2, 0.3])
    assert rate == 0.1


def test_a_step_that_fails_does_not_leave_its_ratio_behind() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    ScaledRates([optimizer], by="this test").set(lambda parameter: 3.0)
    seen: list[float] = []

    def fail() -> float:
        seen.append(optimizer.param_groups[0]["lr"])
        raise MemoryError

    for _ in range(2):
        with pytest.raises(MemoryError):
            optimizer.step(fail)
    assert seen == [3.0, 3.0]
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_ratios_that_a_closure_sets_hold_in_its_own_step() -> None:
    """Lightning runs the backward pass, and with it the schedule, inside the optimizer's step."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    rates = ScaledRates([optimizer], by="this test")
    rates.set(lambda parameter: 3.0)

    def closure() -> float:
        parameter.grad = torch.ones(1)
        rates.set(lambda parameter: 5.0)
        assert rates.rate(optimizer.param_groups[0]) == 5.0
        return 0.0

    optimizer.step(closure)
    assert float(parameter.detach()) == -5.0
    assert optimizer.param_groups[0]["lr"] == 1.0
    rates.remove()
    optimizer.step()
    assert float(parameter.detach()) == -6.0


class Prodigy(torch.optim.SGD):
    """Optimizers that find their own rate keep it in their groups as `d`, and refuse several values of `lr`."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1.0)
        for group in self.param_groups:
            group["d"] = 1e-6


def test_optimizers_that_cannot_have_several_rates() -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    with pytest.raises(AssignmentError, match="Prodigy finds one learning rate for all parameters by itself"):
        ScaledRates([Prodigy(parameters)], by="LayerwiseLR")
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    rates = ScaledRates([optimizer], by="LayerwiseLR")
    with pytest.raises(AssignmentError, match=r"of this SGD are multiplied already: close\(\) that schedule first"):
        ScaledRates([optimizer], by="LayerwiseLR")
    rates.remove()
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(AssignmentError, match="SGD has no lr in its groups"):
        ScaledRates([optimizer], by="LayerwiseLR")
    two = torch.optim.SGD([nn.Parameter(torch.zeros(1)) for _ in range(2)], lr=1.0)
    first, _ = two.param_groups[0]["params"]
    with pytest.raises(AssignmentError, match="need different learning rates: the groups have been changed"):
        ScaledRates([two], by="LayerwiseLR").set({first: 2.0}.get)
