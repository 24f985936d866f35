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
from esdtool.spectra import lapack, trial
from esdtool.spectra.cache import SpectrumCache
from esdtool.spectra.openblas import OpenBlas, find_openblas, symmetric_buffer
from esdtool.spectra.spectrum import compute_spectrum

TOLERANCE = {"float32": 1e-5, "float64": 1e-13}


@pytest.fixture
def openblas() -> OpenBlas:
    found = find_openblas()
    if found is None:
        pytest.skip("neither numpy nor scipy brings an OpenBLAS with all of LAPACK here")
    return found


@pytest.fixture(autouse=True)
def no_earlier_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_decided", {})
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


@pytest.mark.parametrize("order", [1, 3, 64, 65, 128, 300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_may_lie_apart_and_only_the_upper_triangle_counts(openblas: OpenBlas, order: int, dtype: str) -> None:
    matrix = gram(order, dtype)
    for solver in lapack._SOLVERS.values():
        buffer = symmetric_buffer(order, dtype)
        assert buffer.strides[0] % 512 in range(64, 512, 64)
        buffer[:] = np.where(np.triu(np.ones_like(matrix)) > 0, matrix, np.nan)
        assert_eigenvalues(solver(buffer), matrix)


def layouts(matrix: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "rows": matrix,
        "columns": np.asfortranarray(matrix),
        "rows apart": np.pad(matrix, 2)[2:-2, 2:-2],
        "columns apart": np.asfortranarray(np.pad(matrix, 2))[2:-2, 2:-2],
        "elements apart": np.repeat(matrix, 2, axis=1)[:, ::2],
        "upside down": np.ascontiguousarray(matrix[::-1])[::-1],
    }


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (40, 100), (33, 33)])
def test_gram_matrices_of_any_layout(openblas: OpenBlas, shape: tuple[int, int], dtype: str) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    expected = np.triu(matrix.astype(np.float64) @ matrix.T.astype(np.float64))
    for name, view in layouts(matrix).items():
        for pieces in (1, min(3, shape[1])):
            found = lapack.gram_matrix(np.array_split(view, pieces, axis=1))
            assert found.dtype == matrix.dtype, name
            np.testing.assert_allclose(np.triu(found), expected, rtol=0, atol=1e-6 * np.abs(expected).max() + 1e-30)
        np.testing.assert_array_equal(view, matrix)  # left as it was


def test_a_matrix_without_rows_of_unit_stride_is_refused(openblas: OpenBlas) -> None:
    with pytest.raises(ValueError, match="unit stride"):
        openblas.one_stage(np.asfortranarray(gram(20)).repeat(2, axis=0)[::2].T[:, ::2])


@pytest.mark.parametrize("shape", [(500, 700), (700, 500), (1300, 1300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alphas_do_not_depend_on_the_solver(
    monkeypatch: pytest.MonkeyPatch, openblas: OpenBlas, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = np.linalg.svd(matrix.to(torch.float64).numpy(), compute_uv=False)[::-1] ** 2
    alphas = [esdtool.hill(expected).alpha]
    for name in lapack._SOLVERS:
        monkeypatch.setenv("ESDTOOL_LAPACK", name)
        alphas.append(esdtool.hill(esdtool.esd(matrix)).alpha)
    monkeypatch.setattr(lapack, "find_openblas", lambda: None)
    monkeypatch.setenv("ESDTOOL_LAPACK", "torch")
    alphas.append(esdtool.hill(esdtool.esd(matrix)).alpha)
    assert alphas == pytest.approx([alphas[0]] * len(alphas), rel=1e-11)


def counted_trials(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[int]:
    trials: list[int] = []

    def timed(kind: lapack._Class, dtype: np.dtype) -> dict[str, float]:
        trials.append(kind.sample)
        return {name: seconds[name.partition("-")[2].replace("-", "_") or name] for name in kind.candidates}

    monkeypatch.setattr(lapack, "_trial", timed)
    return trials


@pytest.mark.parametrize(
    ("order", "seconds", "winner"),
    [
        (200, {"torch": 1.0, "one_stage": 0.5, "two_stage": 0.1}, "openblas-one-stage"),  # two stages are no candidate
        (900, {"torch": 1.0, "one_stage": 0.5, "two_stage": 0.1}, "openblas-two-stage"),
        (1400, {"torch": 1.0, "one_stage": 0.5, "two_stage": 0.7}, "openblas-one-stage"),
        (2500, {"torch": 1.0, "one_stage": 0.1, "two_stage": 0.7}, "openblas-one-stage"),
        (9000, {"torch": 1.0, "one_stage": 0.1, "two_stage": 0.7}, "openblas-two-stage"),
        (900, {"torch": 0.5, "one_stage": 1.0, "two_stage": 1.0}, "torch"),
        (900, {"torch": 1.0, "one_stage": 0.99, "two_stage": 0.99}, "torch"),  # no gain worth the change
    ],
)
def test_the_fastest_solver_is_chosen_once_for_a_machine(
    monkeypatch: pytest.MonkeyPatch, openblas: OpenBlas, order: int, seconds: dict[str, float], winner: str
) -> None:
    trials = counted_trials(monkeypatch, **seconds)
    assert lapack.solver_for(order, np.float64) == winner
    assert lapack.solver_for(order + 50, np.float64) == winner
    monkeypatch.setattr(trial, "_decided", {})  # another process
    assert lapack.solver_for(order, np.float64) == winner
    assert len(trials) == 1
    lapack.solver_for(order, np.float32)
    lapack.solver_for(1200, np.float64)
    assert len(trials) == (3 if order != 1400 else 2)


def test_the_first_decision_holds_for_all_processes(
    monkeypatch: pytest.MonkeyPatch, openblas: OpenBlas, own_cache: Path
) -> None:
    def timed(kind: lapack._Class, dtype: np.dtype) -> dict[str, float]:
        # Meanwhile another process has decided otherwise.
        folder = own_cache / "lapack"
        folder.mkdir(parents=True)
        (folder / f"{lapack.machine_name()}-float64-{kind.sample}.json").write_text(json.dumps({"solver": "torch"}))
        return {"torch": 1.0, "openblas-one-stage": 0.1}

    monkeypatch.setattr(lapack, "_trial", timed)
    assert lapack.solver_for(100, np.float64) == "torch"


FASTER_OPENBLAS = {"torch": 1.0, "one_stage": 0.1, "two_stage": 0.2}


@pytest.mark.parametrize("damaged", ["", "[]", "{", '{"solver": "mkl"}', '{"solver": ["torch"]}', "[" * 5000])
def test_a_damaged_decision_is_made_again(
    monkeypatch: pytest.MonkeyPatch, openblas: OpenBlas, own_cache: Path, damaged: str
) -> None:
    counted_trials(monkeypatch, **FASTER_OPENBLAS)
    lapack.solver_for(100, np.float64)
    next((own_cache / "lapack").iterdir()).write_text(damaged)
    monkeypatch.setattr(trial, "_decided", {})
    assert lapack.solver_for(100, np.float64) == "openblas-one-stage"


def test_without_a_place_to_keep_it_the_decision_holds_for_the_process(
    monkeypatch: pytest.MonkeyPatch, openblas: OpenBlas, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ESDTOOL_CACHE_DIR", str(tmp_path / "file"))
    trials = counted_trials(monkeypatch, **FASTER_OPENBLAS)
    assert [lapack.solver_for(100, np.float64) for _ in range(3)] == ["openblas-one-stage"] * 3
    assert len(trials) == 1


def test_threads_wait_for_one_trial(monkeypatch: pytest.MonkeyPatch, openblas: OpenBlas) -> None:
    trials = counted_trials(monkeypatch, **FASTER_OPENBLAS)
    threads = [threading.Thread(target=lapack.solver_for, args=(100, np.float64)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trials) == 1


def test_the_trial_times_every_candidate(openblas: OpenBlas) -> None:
    kind = lapack._Class(largest=100, sample=64, candidates=tuple(lapack._SOLVERS))
    seconds = lapack._trial(kind, np.dtype(np.float64))
    assert set(seconds) == set(lapack._SOLVERS)
    assert all(0 <= value < 60 for value in seconds.values())


def test_without_openblas_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lapack, "find_openblas", lambda: None)
    matrix = gram(60)
    assert lapack.solver_for(60, np.float64) == "torch"
    eigenvalues, solver = lapack.symmetric_eigenvalues(matrix.copy())
    assert solver == "torch"
    assert_eigenvalues(eigenvalues, matrix)
    monkeypatch.setenv("ESDTOOL_LAPACK", "openblas")
    with pytest.raises(UsageError, match="neither numpy nor scipy"):
        lapack.symmetric_eigenvalues(matrix)


def test_openblas_alone_means_the_better_of_its_two(monkeypatch: pytest.MonkeyPatch, openblas: OpenBlas) -> None:
    monkeypatch.setenv("ESDTOOL_LAPACK", "openblas")
    assert lapack.solver_for(300, np.float64) == "openblas-one-stage"
    assert lapack.solver_for(3000, np.float64) == "openblas-two-stage"


def test_an_unknown_solver_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESDTOOL_LAPACK", "mkl")
    with pytest.raises(UsageError, match="ESDTOOL_LAPACK=mkl: choose from torch, openblas, openblas-one-stage"):
        lapack.solver_for(10, np.float64)


@pytest.mark.parametrize("solver", ["torch", "openblas-one-stage", "openblas-two-stage"])
def test_the_solver_stands_in_the_output_and_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, openblas: OpenBlas, tmp_path: Path, solver: str
) -> None:
    weights = {"layers.0.mlp.up_proj.weight": torch.randn(70, 80, generator=torch.Generator().manual_seed(0))}
    monkeypatch.setenv("ESDTOOL_LAPACK", solver)
    (module,) = esdtool.analyze(weights).modules
    assert module.solver == solver
    spectrum = compute_spectrum(list(weights.values()), "gram-float64")
    cache = SpectrumCache(folder=tmp_path, limit=2**20)
    cache.save("key", spectrum)
    found = cache.load("key")
    assert found is not None
    assert found.solver == spectrum.solver == solver


def broken(method: str, change: Callable[[np.ndarray], np.ndarray]) -> type[OpenBlas]:
    def wrong(self: OpenBlas, matrix: np.ndarray, **options: int) -> np.ndarray:
        return change(getattr(OpenBlas, method)(self, matrix, **options))

    return type("Broken", (OpenBlas,), {method: wrong})


@pytest.mark.parametrize("method", ["one_stage", "two_stage"])
def test_the_self_test_notices_a_wrong_routine(openblas: OpenBlas, method: str) -> None:
    assert openblas.passes_self_test()
    assert not broken(method, lambda eigenvalues: eigenvalues * 1.001)(openblas._library).passes_self_test()
