"""Eigenvalues by every path against numpy's float64 SVD."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import esdtool
from esdtool.spectra.spectrum import compute_spectrum, storage_floor

SHAPES = [(64, 64), (60, 200), (200, 60), (1, 7), (300, 5000), (2100, 64)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def oracle(matrix: torch.Tensor) -> np.ndarray:
    """Squared singular values, ascending."""
    return np.sort(np.linalg.svd(matrix.to(torch.float64).numpy(), compute_uv=False) ** 2)


def planted(singular: np.ndarray, columns: int, seed: int = 0) -> torch.Tensor:
    """A float64 matrix with given singular values."""
    rng = np.random.default_rng(seed)
    rows = len(singular)
    left, _ = np.linalg.qr(rng.standard_normal((rows, rows)))
    right, _ = np.linalg.qr(rng.standard_normal((columns, rows)))
    return torch.from_numpy((left * singular) @ right.T)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_float64_is_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    spectrum = compute_spectrum([matrix], "gram-float64")
    expected = oracle(matrix)
    np.testing.assert_allclose(spectrum.eigenvalues, expected, rtol=0, atol=1e-13 * expected[-1])
    assert spectrum.eigenvalues.dtype == np.float64


@pytest.mark.parametrize("shape", SHAPES)
def test_every_path_stays_within_its_own_error_bound(shape: tuple[int, int]) -> None:
    size = min(shape)
    matrix = planted(np.logspace(0, -3, size), max(shape), seed=size)
    matrix = matrix if shape[0] <= shape[1] else matrix.T
    expected = oracle(matrix)
    for path in ("gram-float32", "gram-float64", "svd-float64"):
        stored = matrix.to(torch.float32) if path == "gram-float32" else matrix
        reference = oracle(stored)
        spectrum = compute_spectrum([stored], path)
        for found, true in zip(spectrum.eigenvalues, reference, strict=True):
            assert abs(found - true) <= max(spectrum.relative_error(true) * true, spectrum.resolution)
    assert expected[0] == pytest.approx(1e-6 if size > 1 else 1.0, rel=1e-6)


def test_svd_path_resolves_what_the_gram_matrix_cannot() -> None:
    matrix = planted(np.logspace(0, -10, 80), 100)
    by_svd = compute_spectrum([matrix], "svd-float64")
    by_gram = compute_spectrum([matrix], "gram-float64")
    assert by_svd.eigenvalues[0] == pytest.approx(1e-20, rel=1e-4)
    assert by_gram.eigenvalues[0] == 0.0
    assert by_gram.relative_error(1e-20) > 1 > 1e-3 > by_svd.relative_error(1e-20)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(2, 40),
    columns=st.integers(2, 40),
    exponent=st.integers(-20, 20),
)
def test_invariances(seed: int, rows: int, columns: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    base = esdtool.esd(matrix)
    shuffled = matrix[torch.randperm(rows, generator=generator)][:, torch.randperm(columns, generator=generator)]
    tolerance = {"rtol": 0, "atol": 1e-12 * base[-1]}
    np.testing.assert_allclose(esdtool.esd(matrix.T), base, **tolerance)
    np.testing.assert_allclose(esdtool.esd(shuffled), base, **tolerance)
    np.testing.assert_allclose(esdtool.esd(matrix * 10.0**exponent) / 10.0 ** (2 * exponent), base, **tolerance)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("path", ["gram-float32", "gram-float64", "svd-float64"])
def test_extreme_scales_neither_overflow_nor_vanish(scale: float, path: str) -> None:
    matrix = torch.randn(80, 120, dtype=torch.float64)
    expected = oracle(matrix)
    spectrum = compute_spectrum([(matrix * scale).to(torch.float32)], path)
    np.testing.assert_allclose(spectrum.eigenvalues / scale**2, expected, rtol=1e-4)


@pytest.mark.parametrize("exponent", [-1070, -1022, -600, -531, -512, 490, 508, 511, 900, 1018])
@pytest.mark.parametrize("path", ["gram-float32", "gram-float64", "svd-float64"])
def test_weights_whose_squares_are_no_float64_keep_their_ratios(exponent: int, path: str) -> None:
    matrix = torch.randn(40, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix = (matrix * 4).round()  # few digits, which the smallest float64 keep too
    scaled = torch.from_numpy(np.ldexp(matrix.numpy(), exponent))
    assert torch.isfinite(scaled).all()
    spectrum = compute_spectrum([scaled], path)
    expected = oracle(matrix)
    tolerance = 1e-4 if path == "gram-float32" else 1e-11
    np.testing.assert_allclose(spectrum.eigenvalues / spectrum.lambda_max, expected / expected[-1], atol=tolerance)
    true = math.log2(expected[-1]) + 2 * exponent
    assert math.log2(spectrum.lambda_max) + spectrum.exponent == pytest.approx(true, abs=2 * tolerance)
    assert (spectrum.unscaled(spectrum.lambda_max) is not None) == (-1022 <= true < 1024)
    norm = spectrum.unscaled(math.sqrt(spectrum.lambda_max), power=2)
    if -1022 <= true / 2 < 1023.9:
        assert norm == pytest.approx(math.ldexp(math.sqrt(expected[-1]), exponent), rel=2 * tolerance)
    if spectrum.exponent:
        with pytest.raises(ValueError, match="scale the matrix"):
            esdtool.esd(scaled, path=path)


def test_pooled_matrices_give_the_union_of_their_spectra() -> None:
    first, second = torch.randn(20, 30), torch.randn(20, 30)
    pooled = compute_spectrum([first, second], "gram-float64").eigenvalues
    np.testing.assert_allclose(pooled, np.sort(np.concatenate([oracle(first), oracle(second)])), rtol=1e-9)


def test_tf32_is_off_inside_and_restored_after() -> None:
    from esdtool.spectra.precision import full_precision_matmul

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with full_precision_matmul():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(("name", "loose", "exact"), [("fp32_precision", "tf32", "ieee"), ("allow_tf32", True, False)])
def test_tf32_stays_off_for_every_thread_inside(
    monkeypatch: pytest.MonkeyPatch, name: str, loose: object, exact: object
) -> None:
    from esdtool.spectra.precision import full_precision_matmul

    matmul = SimpleNamespace(**{name: loose})
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    second_is_in, first_is_out, seen = threading.Event(), threading.Event(), []

    def second() -> None:
        with full_precision_matmul(), full_precision_matmul():
            second_is_in.set()
            assert first_is_out.wait(10)
            seen.append(getattr(matmul, name))

    thread = threading.Thread(target=second)
    with full_precision_matmul():
        thread.start()
        assert second_is_in.wait(10)
    # The one that came first has left, the other is still at work.
    first_is_out.set()
    thread.join()
    assert seen == [exact]
    assert getattr(matmul, name) == loose


def test_tf32_is_never_on_inside_and_never_off_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    from esdtool.spectra.precision import full_precision_matmul

    matmul = SimpleNamespace(fp32_precision="tf32")
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    seen: set[str] = set()

    def job() -> None:
        for _ in range(300):
            with full_precision_matmul():
                seen.add(matmul.fp32_precision)

    threads = [threading.Thread(target=job) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"ieee"}
    assert matmul.fp32_precision == "tf32"


def test_storage_floor_bounds_what_rounding_does() -> None:
    """A rank-5 product stored in each format: all other eigenvalues lie below the floor, and not absurdly far."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(200, 5, generator=generator, dtype=torch.float64) @ torch.randn(
        5, 300, generator=generator, dtype=torch.float64
    )
    for dtype, slack in ((torch.bfloat16, 10), (torch.float16, 10), (torch.float32, 400)):
        stored = exact.to(dtype)
        eigenvalues = oracle(stored)
        floor = storage_floor((200, 300), float(eigenvalues.sum()) / 60_000, dtype)
        assert eigenvalues[194] <= floor <= slack * eigenvalues[194]
        assert eigenvalues[195] > 100 * floor


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.zeros((3, 3)), "zero"),
        (np.ones(3), "2-D"),
        (np.ones((0, 3)), "2-D matrix with elements"),
        (np.array([[1.0, np.nan]]), "NaN"),
        (np.array([[1.0, np.inf]]), "NaN or infinity"),
    ],
)
def test_esd_refuses_what_has_no_spectrum(matrix: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        esdtool.esd(matrix)


def test_esd_takes_lists_integers_and_parameters() -> None:
    assert esdtool.esd([[3, 0], [0, 4]]) == pytest.approx([9.0, 16.0])
    assert esdtool.esd(torch.nn.Linear(3, 4).weight).shape == (3,)
