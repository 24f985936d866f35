"""The same numbers on every device: spectra, alphas, decays and training, each against the CPU or numpy.

`pytest -m gpu` runs what needs a GPU.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import esdtool
from esdtool.optim import AlphaDecay
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.scoring import score_matrices
from esdtool.spectra.spectrum import compute_spectrum
from esdtool.spectra.vectors import find_vectors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A matrix with a tail: random, with a few strong directions."""
    generator = torch.Generator().manual_seed(rows + columns)
    strong = torch.randn(rows, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
    return (torch.randn(rows, columns, generator=generator) + strong / 4).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (128, 128), (60, 5000)])
@pytest.mark.parametrize("path", ["gram-float32", "gram-float64", "svd-float64"])
def test_a_spectrum(device: torch.device, path: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = weight(*shape, dtype)
    expected = np.sort(np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2)
    found = compute_spectrum([matrix], path, device=device).eigenvalues
    tolerance = 1e-6 if path == "gram-float32" else 1e-13
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * expected[-1])


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alphas(device: torch.device, dtype: torch.dtype, fast: bool) -> None:
    matrix = weight(200, 300, dtype)
    expected = esdtool.hill(np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2).alpha
    found = score_matrices([matrix], ScoreOptions(fast=fast), device=device).alpha
    assert found == pytest.approx(expected, rel=1e-4 if fast else 1e-9)


@pytest.mark.parametrize("shape", [(200, 300), (300, 200)])
def test_singular_vectors(device: torch.device, shape: tuple[int, int]) -> None:
    matrix = weight(*shape)
    matrix[:, 7] *= 30
    spectrum = compute_spectrum([matrix], "gram-float64")
    found = find_vectors([matrix], spectrum, xmin=float(np.median(spectrum.eigenvalues)), device=device)
    left, _, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    assert found.rows.tail.ipr == pytest.approx((left[:, :100] ** 4).sum(axis=0).mean(), rel=1e-6)
    assert found.columns.bulk.ipr == pytest.approx((right[100:] ** 4).sum(axis=1).mean(), rel=1e-6)
    assert found.columns.most_localised[0].channels[0].index == 7


def test_degenerate_matrices(device: torch.device) -> None:
    low_rank = weight(100, 3) @ weight(3, 120)
    for matrix in (low_rank, torch.eye(80), torch.zeros(70, 80), torch.full((90, 90), float("nan"))):
        on_cpu, found = (
            score_matrices([matrix], ScoreOptions(), device=each) for each in (torch.device("cpu"), device)
        )
        assert found.status == on_cpu.status
        assert found.alpha == (None if on_cpu.alpha is None else pytest.approx(on_cpu.alpha, rel=1e-9))


@pytest.mark.parametrize("fast", [False, True])
def test_an_analysis(device: torch.device, bundled: Path, fast: bool) -> None:
    expected = esdtool.analyze(bundled, device="cpu", fit=("hill", "ks"), cache=False)
    found = esdtool.analyze(bundled, device=str(device), fit=("hill", "ks"), fast=fast, cache=False)
    for ours, theirs in zip(found.modules, expected.modules, strict=True):
        assert ours.alphas == pytest.approx(theirs.alphas, rel=1e-4 if fast else 1e-9)


@pytest.mark.gpu
@pytest.mark.slow
def test_an_analysis_of_a_large_model(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    shapes = {"self_attn.q_proj": (2048, 2048), "mlp.gate_proj": (5461, 2048), "mlp.down_proj": (2048, 5461)}
    weights = {f"model.layers.0.{name}.weight": weight(*shape, torch.bfloat16) for name, shape in shapes.items()}
    expected = esdtool.analyze(weights, device="cpu")
    for fast, tolerance in ((False, 1e-9), (True, 1e-4)):
        for ours, theirs in zip(
            esdtool.analyze(weights, device="cuda", fast=fast).modules, expected.modules, strict=True
        ):
            assert ours.alpha == pytest.approx(theirs.alpha, rel=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("delay", [0, 2])
def test_a_schedule_on_cuda_equals_one_on_the_cpu(delay: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 64))

    def decays(where: torch.device) -> list[list[float]]:
        copied = copy.deepcopy(model).to(where)
        optimizer = torch.optim.AdamW(copied.parameters(), lr=1e-3, weight_decay=0.1)
        schedule = AlphaDecay(copied, optimizer, weight_decay=0.1, interval=3, delay=delay)
        found = []
        generator = torch.Generator().manual_seed(1)
        for _ in range(7):
            optimizer.zero_grad()
            copied(torch.randn(8, 64, generator=generator).to(where)).square().mean().backward()
            optimizer.step()
            schedule.step()
            found.append([group["weight_decay"] for group in optimizer.param_groups])
        return found

    for ours, theirs in zip(decays(torch.device("cuda")), decays(torch.device("cpu")), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)  # the weights themselves differ by rounding
