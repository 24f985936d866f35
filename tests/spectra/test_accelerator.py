"""The batched torch code that runs on accelerators, here on the CPU, against numpy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from esdtool.spectra import accelerator
from esdtool.spectra.accelerator import (
    accelerator_eigenvalues,
    accelerator_svd,
    gram_matrices,
    multiplies_16_bit,
    stacked_on,
)


@pytest.fixture(autouse=True)
def no_earlier_self_test() -> Iterator[None]:
    multiplies_16_bit.cache_clear()
    yield
    multiplies_16_bit.cache_clear()


def oracle(stack: torch.Tensor) -> np.ndarray:
    return np.sort(np.linalg.svd(stack.to(torch.float64).numpy(), compute_uv=False).ravel() ** 2)


@pytest.mark.parametrize("shape", [(3, 70, 5000), (2, 300, 40), (1, 1, 9), (4, 20, 20)])
def test_eigenvalues_of_a_stack(shape: tuple[int, int, int]) -> None:
    stack = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = oracle(stack)
    for found, tolerance in (
        (accelerator_eigenvalues(stack, dtype=torch.float32)[0], 1e-6),
        (accelerator_eigenvalues(stack, dtype=torch.float64)[0], 1e-13),
        (accelerator_svd(stack), 1e-13),
    ):
        np.testing.assert_allclose(np.sort(found), expected, rtol=0, atol=tolerance * expected[-1])


def exact_product(block: torch.Tensor) -> torch.Tensor:
    return (block.to(torch.float64) @ block.to(torch.float64).mT).to(torch.float32)


def rounded_sums(block: torch.Tensor) -> torch.Tensor:
    return (block @ block.mT).to(torch.float32)


def absent(block: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("no such kernel")


@pytest.mark.parametrize(("product", "is_used"), [(exact_product, True), (rounded_sums, False), (absent, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bit_weights_are_used_where_they_sum_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, product: object, is_used: bool
) -> None:
    monkeypatch.setattr(accelerator, "_product_16_bit", product)
    assert multiplies_16_bit(dtype, torch.device("cpu")) == is_used
    stack = torch.randn(2, 30, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = stack.to(torch.float64) @ stack.to(torch.float64).mT
    found = gram_matrices(stack, dtype=torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.to(torch.float64), expected, rtol=0, atol=1e-6 * float(expected.max()))


def test_float64_never_takes_16_bit_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "_product_16_bit", lambda _: pytest.fail("used"))
    stack = torch.randn(1, 5, 9).to(torch.bfloat16)
    assert gram_matrices(stack, dtype=torch.float64).dtype == torch.float64


def test_stacked_as_they_are_stored() -> None:
    matrices = [torch.randn(3, 4).to(torch.bfloat16) for _ in range(2)]
    found = stacked_on(matrices, torch.device("cpu"))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.stack(matrices))
