"""The ways to the eigenvalues on an accelerator, with the CPU in its place, against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import esdtool
from esdtool.errors import UsageError
from esdtool.spectra import accelerator_solvers, trial
from esdtool.spectra.accelerator_solvers import on_device_or_cpu, solve_on_accelerator
from esdtool.spectra.band_reduction import reduce_to_band
from esdtool.spectra.openblas import find_openblas
from esdtool.spectra.spectrum import compute_stacked

WAYS = ("torch", "two-stage", "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_decided", {})
    monkeypatch.delenv("ESDTOOL_ACCELERATOR", raising=False)


def gram(order: int, dtype: torch.dtype = torch.float64, rank: int | None = None, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(order)
    sample = torch.randn(batch, order, rank or order, dtype=dtype, generator=generator)
    return sample @ sample.mT


def from_band(banded: torch.Tensor) -> np.ndarray:
    """The whole symmetric matrix."""
    order = banded.shape[0]
    lower = sum(torch.diag(banded[: order - offset, offset], -offset) for offset in range(min(banded.shape[1], order)))
    assert isinstance(lower, torch.Tensor)
    return (lower + lower.tril(-1).mT).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(
    ("order", "band"), [(1, 4), (2, 1), (5, 4), (6, 4), (7, 4), (33, 8), (64, 8), (65, 8), (90, 32), (7, 1)]
)
def test_a_band_keeps_the_eigenvalues(order: int, band: int, rank: int | None, dtype: torch.dtype) -> None:
    matrix = gram(order, dtype, rank)[0]
    expected = np.linalg.eigvalsh(matrix.double().numpy())
    banded = reduce_to_band(matrix.clone(), band=band)
    assert banded.shape == (order, band + 1)
    found = np.linalg.eigvalsh(from_band(banded.double()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dtype] * expected[-1])


@pytest.mark.parametrize("matrix", [torch.eye(50), torch.zeros(50, 50), torch.diag(torch.logspace(0, -12, 50))])
def test_a_band_of_matrices_that_need_no_reflection(matrix: torch.Tensor) -> None:
    matrix = matrix.double()
    assert torch.equal(torch.from_numpy(from_band(reduce_to_band(matrix.clone(), band=4))), matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("order", "batch"), [(1, 2), (20, 3), (34, 2), (130, 2)])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_finds_the_eigenvalues(
    monkeypatch: pytest.MonkeyPatch, way: str, order: int, batch: int, dtype: torch.dtype
) -> None:
    if find_openblas() is None and way == "two-stage":
        pytest.skip("neither numpy nor scipy brings an OpenBLAS with all of LAPACK here")
    monkeypatch.setenv("ESDTOOL_ACCELERATOR", way)
    stack = gram(order, dtype, batch=batch)
    expected = np.linalg.eigvalsh(stack.double().numpy())
    found, solver = solve_on_accelerator(stack.clone())
    assert (solver == "accelerator-two-stage") == (way == "two-stage" and order > 33)
    for ours, theirs in zip(found.reshape(batch, order), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE[dtype] * theirs[-1])


def test_alphas_do_not_depend_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [torch.randn(200, 300, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    expected = [esdtool.hill(np.linalg.svd(each.double().numpy(), compute_uv=False) ** 2).alpha for each in matrices]
    for way in WAYS:
        monkeypatch.setenv("ESDTOOL_ACCELERATOR", way)
        spectra = compute_stacked(
            matrices, "gram-float64", device=torch.device("cpu"), scales=[1.0, 1.0], roundoffs=[None, None]
        )
        assert [esdtool.hill(each.eigenvalues).alpha for each in spectra] == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("way", ["two-stage", "cpu"])
def test_what_fails_is_computed_once_more(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    def fails(*_: object) -> None:
        raise torch.linalg.LinAlgError("no such kernel")

    monkeypatch.setenv("ESDTOOL_ACCELERATOR", way)
    monkeypatch.setattr(accelerator_solvers, "_finish", fails)
    matrix = gram(60)
    found, solver = solve_on_accelerator(matrix.clone())
    assert solver == "torch"
    np.testing.assert_allclose(found, np.linalg.eigvalsh(matrix[0].numpy()), rtol=1e-9)


def test_a_failing_solver_falls_back_to_the_cpu() -> None:
    calls = []

    def fails_first(batch: torch.Tensor) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return batch.sum(dim=-1)

    assert on_device_or_cpu(fails_first, torch.ones(2, 3)).tolist() == [3.0, 3.0]
    calls.clear()

    def infinite_first(batch: torch.Tensor) -> torch.Tensor:
        calls.append(batch)
        return batch / (len(calls) - 1)

    assert on_device_or_cpu(infinite_first, torch.ones(2)).tolist() == [1, 1]


def test_the_trial_times_every_way_and_leaves_out_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrix: torch.Tensor, *, band: int) -> torch.Tensor:
        raise NotImplementedError("geqrf is not implemented here")

    kind = accelerator_solvers._Class(largest=100, sample=64, batch=2)
    seconds = accelerator_solvers._trial(kind, WAYS, torch.float64, torch.device("cpu"))
    assert set(seconds) == set(WAYS)
    assert all(0 <= value < 60 for value in seconds.values())
    monkeypatch.setattr(accelerator_solvers, "reduce_to_band", fails)
    assert accelerator_solvers._trial(kind, WAYS, torch.float64, torch.device("cpu"))["two-stage"] == math.inf


def test_a_decision_holds_for_its_class_of_orders_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = []

    def timed(kind: accelerator_solvers._Class, ways: tuple[str, ...], *_: object) -> dict[str, float]:
        trials.append(kind.sample)
        return {way: 0.5 if way == ways[-1] else 1.0 for way in ways}

    monkeypatch.setattr(accelerator_solvers, "_trial", timed)
    devices = [torch.empty(1, order, order, device="meta") for order in (100, 300, 500, 1000, 4096)]
    assert [accelerator_solvers._way_for(each) for each in devices] == ["cpu"] * 5
    assert trials == [256, 768, 4096]


def test_an_unknown_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESDTOOL_ACCELERATOR", "magma")
    with pytest.raises(UsageError, match="ESDTOOL_ACCELERATOR=magma: choose from torch, two-stage, cpu"):
        solve_on_accelerator(gram(10))
