"""The symmetric solvers against numpy's, and the choice between them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import esdtool
from esdtool.errors import UsageError
from esdtool.spectra import lapack
from esdtool.spectra.openblas import OpenBlas, find_openblas

TOLERANCE = {"float32": 1e-5, "float64": 1e-13}


@pytest.fixture
def openblas() -> OpenBlas:
    found = find_openblas()
    if found is None:
        pytest.skip("neither numpy nor scipy brings an OpenBLAS with all of LAPACK here")
    return found


@pytest.fixture(autouse=True)
def no_earlier_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lapack, "_decided", {})
    monkeypatch.delenv("ESDTOOL_LAPACK", raising=False)


def gram(order: int, dtype: str = "float64", rank: int | None = None) -> np.ndarray:
    sample = np.random.default_rng(order).standard_normal((order, rank or order)).astype(dtype)
    return np.ascontiguousarray(sample @ sample.T)


def assert_eigenvalues(found: np.ndarray, matrix: np.ndarray) -> None:
    expected = np.linalg.eigvalsh(matrix.astype(np.float64))
    assert found.dtype == matrix.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[matrix.dtype.name] * expected[-1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("order", [1, 2, 3, 65, 300])
def test_one_stage(openblas: OpenBlas, order: int, dtype: str) -> None:
    matrix = gram(order, dtype)
    assert_eigenvalues(openblas.one_stage(matrix.copy()), matrix)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("order", "band"), [(2, 1), (9, 8), (65, 16), (300, 32), (301, 48), (300, 64)])
def test_two_stages(openblas: OpenBlas, order: int, band: int, dtype: str) -> None:
    matrix = gram(order, dtype)
    assert_eigenvalues(openblas.two_stage(matrix.copy(), band=band), matrix)


@pytest.mark.parametrize(
    "matrix", [gram(200, rank=3), np.eye(90), np.diag(np.logspace(0, -12, 120)), np.zeros((70, 70))]
)
def test_degenerate_matrices(openblas: OpenBlas, matrix: np.ndarray) -> None:
    scale = max(float(np.abs(matrix).max()), 1.0) * len(matrix)
    expected = np.linalg.eigvalsh(matrix)
    for found in (openblas.one_stage(matrix.copy()), openblas.two_stage(matrix.copy(), band=16)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * scale)


def test_alphas_do_not_depend_on_the_library(monkeypatch: pytest.MonkeyPatch, openblas: OpenBlas) -> None:
    matrix = torch.randn(1300, 1400, generator=torch.Generator().manual_seed(0))
    alphas = []
    for name in ("torch", "openblas"):
        monkeypatch.setenv("ESDTOOL_LAPACK", name)
        alphas.append(esdtool.hill(esdtool.esd(matrix)).alpha)
    assert alphas[0] == pytest.approx(alphas[1], rel=1e-11)


def counted_trials(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> list[int]:
    trials: list[int] = []

    def trial(order: int, dtype: np.dtype) -> dict[str, float]:
        trials.append(order)
        return seconds

    monkeypatch.setattr(lapack, "_trial", trial)
    return trials


@pytest.mark.parametrize(
    ("seconds", "winner"),
    [
        ({"torch": 1.0, "openblas": 0.5}, "openblas"),
        ({"torch": 0.5, "openblas": 1.0}, "torch"),
        ({"torch": 1.0, "openblas": 0.99}, "torch"),  # no gain worth the change
    ],
)
def test_the_faster_library_is_chosen_once_for_a_machine(
    monkeypatch: pytest.MonkeyPatch, openblas: OpenBlas, seconds: dict[str, float], winner: str
) -> None:
    trials = counted_trials(monkeypatch, seconds)
    assert lapack.lapack_for(200, np.float64) == winner
    assert lapack.lapack_for(300, np.float64) == winner
    monkeypatch.setattr(lapack, "_decided", {})  # another process
    assert lapack.lapack_for(200, np.float64) == winner
    assert len(trials) == 1
    lapack.lapack_for(200, np.float32)
    lapack.lapack_for(2000, np.float64)
    assert len(trials) == 3


def test_the_first_decision_holds_for_all_processes(
    monkeypatch: pytest.MonkeyPatch, openblas: OpenBlas, own_cache: Path
) -> None:
    def trial(order: int, dtype: np.dtype) -> dict[str, float]:
        # Meanwhile another process has decided otherwise.
        folder = own_cache / "lapack"
        folder.mkdir(parents=True)
        (folder / f"{lapack._machine()}-float64-192.json").write_text(json.dumps({"lapack": "torch"}))
        return {"torch": 1.0, "openblas": 0.1}

    monkeypatch.setattr(lapack, "_trial", trial)
    assert lapack.lapack_for(100, np.float64) == "torch"


@pytest.mark.parametrize("damaged", ["", "[]", "{", '{"lapack": "mkl"}', "[" * 5000])
def test_a_damaged_decision_is_made_again(
    monkeypatch: pytest.MonkeyPatch, openblas: OpenBlas, own_cache: Path, damaged: str
) -> None:
    counted_trials(monkeypatch, {"torch": 1.0, "openblas": 0.1})
    lapack.lapack_for(100, np.float64)
    next((own_cache / "lapack").iterdir()).write_text(damaged)
    monkeypatch.setattr(lapack, "_decided", {})
    assert lapack.lapack_for(100, np.float64) == "openblas"


def test_without_a_place_to_keep_it_the_decision_holds_for_the_process(
    monkeypatch: pytest.MonkeyPatch, openblas: OpenBlas, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ESDTOOL_CACHE_DIR", str(tmp_path / "file"))
    trials = counted_trials(monkeypatch, {"torch": 1.0, "openblas": 0.1})
    assert [lapack.lapack_for(100, np.float64) for _ in range(3)] == ["openblas"] * 3
    assert len(trials) == 1


def test_threads_wait_for_one_trial(monkeypatch: pytest.MonkeyPatch, openblas: OpenBlas) -> None:
    trials = counted_trials(monkeypatch, {"torch": 1.0, "openblas": 0.1})
    threads = [threading.Thread(target=lapack.lapack_for, args=(100, np.float64)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trials) == 1


def test_the_trial_times_both_libraries(openblas: OpenBlas) -> None:
    seconds = lapack._trial(64, np.dtype(np.float64))
    assert set(seconds) == {"torch", "openblas"}
    assert all(0 <= value < 60 for value in seconds.values())


def test_without_openblas_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lapack, "find_openblas", lambda: None)
    matrix = gram(60)
    assert lapack.lapack_for(60, np.float64) == "torch"
    assert_eigenvalues(lapack.symmetric_eigenvalues(matrix.copy()), matrix)
    monkeypatch.setenv("ESDTOOL_LAPACK", "openblas")
    with pytest.raises(UsageError, match="neither numpy nor scipy"):
        lapack.symmetric_eigenvalues(matrix)


def test_an_unknown_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESDTOOL_LAPACK", "mkl")
    with pytest.raises(UsageError, match="ESDTOOL_LAPACK=mkl: choose from torch, openblas"):
        lapack.lapack_for(10, np.float64)


def broken(method: str, change: Callable[[np.ndarray], np.ndarray]) -> type[OpenBlas]:
    def wrong(self: OpenBlas, matrix: np.ndarray, **options: int) -> np.ndarray:
        return change(getattr(OpenBlas, method)(self, matrix, **options))

    return type("Broken", (OpenBlas,), {method: wrong})


@pytest.mark.parametrize("method", ["one_stage", "two_stage"])
def test_the_self_test_notices_a_wrong_routine(openblas: OpenBlas, method: str) -> None:
    assert openblas.passes_self_test()
    assert not broken(method, lambda eigenvalues: eigenvalues * 1.001)(openblas._library).passes_self_test()
