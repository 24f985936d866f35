"""The model behind `--dry-run`: what it makes of measured times. (That the times fit is a matter of benchmarks.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esdtool.analysis import timing as calibration
from esdtool.analysis.plan import make_plan
from esdtool.analysis.timing import (
    ACCELERATORS,
    Calibration,
    at_best,
    calibrate,
    estimate_seconds,
    faster_choice,
    makespan,
)
from esdtool.spectra.options import ScoreOptions


def cubic(order: int) -> float:
    return 1e-9 * order**3


MEASURED = Calibration(
    orders=(64, 256, 768), seconds=(cubic(64), cubic(256), cubic(768)), seconds_per_flop=1e-10
)  # fmt: skip


def test_between_and_beyond_the_measured_orders() -> None:
    for order in (64, 100, 256, 500, 768, 4096):
        assert MEASURED.of_shape(order, order) == pytest.approx(cubic(order))
    assert MEASURED.of_shape(10, 10) == pytest.approx(cubic(64))  # what is tiny costs its overhead
    assert MEASURED.of_shape(768, 2048) - cubic(768) == pytest.approx(768**2 * 1280 * 1e-10)
    assert MEASURED.of_shape(2048, 768) == MEASURED.of_shape(768, 2048)


def test_convolutions_and_low_rank_updates() -> None:
    weights = {
        "conv1.weight": torch.randn(64, 64, 3, 3),
        "layers.0.mlp.up_proj.weight": torch.randn(64, 64),
    }
    conv, linear = sorted(make_plan(weights, ScoreOptions()).selection.modules, key=lambda module: -len(module.shape))
    assert MEASURED.of_module(conv) == pytest.approx(9 * MEASURED.of_module(linear))


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), st.integers(1, 6))
def test_the_makespan_lies_between_its_bounds(costs: list[float], slots: int) -> None:
    found = makespan(costs, slots)
    assert max(max(costs), sum(costs) / slots) - 1e-9 <= found
    assert found <= sum(costs) / slots + (1 - 1 / slots) * max(costs) + 1e-9  # any list schedule (Graham 1966)
    assert makespan(costs, 1) == pytest.approx(sum(costs))


def test_a_plan_is_the_sum_of_its_modules(bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(bundled, ScoreOptions(), jobs=1)
    monkeypatch.setattr(calibration, "calibrate", lambda _: MEASURED)
    expected = sum(cubic(192) + 192**2 * (max(module.shape) - 192) * 1e-10 for module in plan.selection.modules)
    assert estimate_seconds(plan) == pytest.approx(expected)


def test_nothing_larger_than_the_plan_is_timed(llama_dir: Path) -> None:
    found = calibrate(make_plan(llama_dir, ScoreOptions(fit=("hill", "ks"))))
    assert found.orders == (64,)
    assert found.seconds[0] > 0
    assert found.seconds_per_flop >= 0


def test_the_roofline_of_a_square_matrix() -> None:
    (module,) = make_plan({"layers.0.mlp.up_proj.weight": torch.empty(3000, 3000)}, ScoreOptions()).selection.modules
    a100 = ACCELERATORS[0]
    assert at_best([module], a100) == pytest.approx(5 / 3 * 2.7e10 / 19.5e12 + 8 / 3 * 2.7e10 / 2.0e12)
    assert at_best([module, module], a100) == 2 * at_best([module], a100)


@pytest.mark.parametrize(
    ("seconds", "options", "is_said"),
    [
        (59.0, ScoreOptions(), False),
        (61.0, ScoreOptions(), True),
        (61.0, ScoreOptions(fast=True), False),
        (61.0, ScoreOptions(spectrum="svd"), False),
        (61.0, ScoreOptions(spectrum="slq"), False),
    ],
)
def test_fast_is_pointed_out_where_it_saves_a_wait(
    bundled: Path, seconds: float, options: ScoreOptions, is_said: bool
) -> None:
    hint = faster_choice(make_plan(bundled, options), seconds)
    assert (hint is not None) == is_said
    assert hint is None or ("61 s" in hint and "--fast" in hint and "1e-4" in hint)


def test_what_is_short_in_any_case_is_not_predicted(bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "calibrate", lambda _: pytest.fail("timed"))
    assert faster_choice(make_plan(bundled, ScoreOptions())) is None


def test_the_trial_of_solvers_is_over_before_anything_is_timed(
    llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    monkeypatch.setattr(calibration, "solver_for", lambda *_: happened.append("chosen"))
    monkeypatch.setattr(calibration, "_time", lambda *_: happened.append("timed") or 1.0)
    calibrate(make_plan(llama_dir, ScoreOptions()))
    assert "chosen" in happened
    assert "chosen" not in happened[happened.index("timed") :]
