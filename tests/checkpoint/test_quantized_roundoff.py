"""The rounding errors that the catalogue states, against rounding Gaussian weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from esdtool.checkpoint.quantized import roundoff

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def gaussian_groups(group: int) -> torch.Tensor:
    return torch.randn(max(400_000 // group, 1), group, generator=torch.Generator().manual_seed(1))


def relative_error(weight: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((weight - rounded).norm() / weight.norm())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 128, 4096])
def test_integers(bits: int, group: int) -> None:
    weight = gaussian_groups(group)
    step = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / (2**bits - 1)
    zero = (-weight.amin(1, keepdim=True) / step).round()
    rounded = ((weight / step + zero).round().clamp(0, 2**bits - 1) - zero) * step
    assert roundoff.integer_roundoff(bits, group) == pytest.approx(relative_error(weight, rounded), rel=0.25)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
@pytest.mark.parametrize("group", [128 * 128, 400_000])
def test_fp8(dtype: str, group: int) -> None:
    weight = gaussian_groups(group)
    kind = getattr(torch, dtype)
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(kind).max
    rounded = (weight / scale).to(kind).float() * scale
    assert roundoff.float_roundoff(dtype, group) == pytest.approx(relative_error(weight, rounded), rel=0.05)


def nearest(weight: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    levels = levels.sort().values
    return levels[torch.bucketize(weight, (levels[1:] + levels[:-1]) / 2)]


def test_mxfp4() -> None:
    # Weights of many sizes: the power of two is then as often just above as just below.
    weight = gaussian_groups(32)
    weight = weight * torch.exp2(torch.linspace(0, 3, len(weight))).unsqueeze(1)
    scale = torch.exp2(weight.abs().amax(1, keepdim=True).log2().floor() - 2)
    rounded = nearest(weight / scale, torch.cat([E2M1, -E2M1])) * scale
    size = weight.norm(dim=1, keepdim=True)
    measured = relative_error(weight / size, rounded / size)
    assert roundoff.microscaling_roundoff("float4_e2m1", 32) == pytest.approx(measured, rel=0.1)


def test_nvfp4() -> None:
    weight = gaussian_groups(16)
    scale = weight.abs().amax(1, keepdim=True) / 6
    rounded = nearest(weight / scale, torch.cat([E2M1, -E2M1])) * scale
    assert roundoff.nvfp4_roundoff() == pytest.approx(relative_error(weight, rounded), rel=0.15)


@pytest.mark.parametrize(("kind", "estimate"), [("nf4", roundoff.nf4_roundoff), ("fp4", roundoff.bnb_fp4_roundoff)])
def test_bitsandbytes(kind: str, estimate: Callable[[int], float]) -> None:
    import warnings

    with warnings.catch_warnings():
        # On import it looks for GPU libraries and optional kernels, and warns where there are none.
        warnings.simplefilter("ignore")
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    weight = gaussian_groups(64)
    rounded = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type=kind))
    assert estimate(64) == pytest.approx(relative_error(weight, rounded), rel=0.15)
