"""De-quantisation against the libraries that define the formats, or against loops written from their documentation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esdtool.checkpoint.local import open_file
from esdtool.checkpoint.memory import from_state_dict
from esdtool.checkpoint.quantized.wrapper import dequantized
from tests.checkpoint.quantized_check import check, gaussian, opened, pack_rows

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


# fp8 and int8


def blockwise(codes: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Element by element: the scale of the block that (i, j) lies in."""
    expected = torch.empty(codes.shape)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            expected[i, j] = codes[i, j].float() * scale[i // rows, j // columns].float()
    return expected


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
@pytest.mark.parametrize(
    ("shape", "block", "named"),
    [
        ((256, 384), (128, 128), True),
        ((192, 300), (128, 128), False),  # neither dimension a multiple of the block
        ((60, 90), (20, 30), True),
        ((128, 96), (32, 32), False),
    ],
)
def test_fp8_with_a_scale_for_each_block(
    dtype: str, shape: tuple[int, int], block: tuple[int, int], named: bool
) -> None:
    codes = gaussian(*shape).to(getattr(torch, dtype))
    scale = gaussian(*(-(-size // b) for size, b in zip(shape, block, strict=True)), seed=1).abs() + 0.1
    config = {"quant_method": "fp8", "weight_block_size": list(block)} if named else None
    checkpoint = opened({"m.q.weight": codes, "m.q.weight_scale_inv": scale}, config)
    check(checkpoint, "m.q.weight", blockwise(codes, scale, *block))
    assert "m.q.weight_scale_inv" in checkpoint.tensors


def test_fp8_as_transformers_undoes_it() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = gaussian(256, 256).to(torch.float8_e4m3fn)
    scale = gaussian(2, 2, seed=1).abs()
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    check(opened({"q.weight": codes, "q.weight_scale_inv": scale}), "q.weight", expected)


def test_fp8_experts_that_are_stacked_read_only_their_scales() -> None:
    codes = gaussian(3, 256, 130).to(torch.float8_e4m3fn)
    scale = gaussian(3, 2, 2, seed=1).abs()
    expected = torch.stack([blockwise(c, s, 128, 128) for c, s in zip(codes, scale, strict=True)])
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    check(opened({name: codes, f"{name}_scale_inv": scale}, config), name, expected)


@pytest.mark.parametrize("scale_dtype", ["uint8", "float8_e8m0fnu"])
def test_fp8_with_exponents_for_scales(scale_dtype: str) -> None:
    """MXFP8: the byte b means 2^(b - 127)."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = gaussian(4, 128).to(torch.float8_e4m3fn)
    exponents = torch.randint(118, 124, (4, 4), dtype=torch.uint8)
    expected = Fp8Dequantize(None)._dequantize_one(codes, exponents, torch.float32)
    scale = exponents.view(getattr(torch, scale_dtype))
    check(opened({"q.weight": codes, "q.weight_scale": scale}), "q.weight", expected)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "scale_weight", "weight.scale"])
@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (6,)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_one_scale_or_one_for_each_row(suffix: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codes = (gaussian(6, 10) * 20).to(dtype)
    scale = gaussian(*shape, seed=1).abs()
    of_row = scale.reshape(-1).expand(6) if scale.numel() == 1 else scale.reshape(6)
    expected = torch.stack([row.float() * s for row, s in zip(codes, of_row, strict=True)])
    check(opened({"q.weight": codes, f"q.{suffix}": scale}), "q.weight", expected)


def test_int8_that_is_not_symmetric() -> None:
    codes = torch.randint(-128, 128, (4, 12), dtype=torch.int8)
    scale, zero = gaussian(4, 1).abs(), torch.tensor([[-7], [0], [3], [100]], dtype=torch.int8)
    expected = (codes.float() - zero.float()) * scale
    check(opened({"q.weight": codes, "q.weight_scale": scale, "q.weight_zero_point": zero}), "q.weight", expected)


def test_stacked_experts_of_fbgemm_have_scales_of_outputs() -> None:
    """FBGEMM's Llama-4: weights [experts, in, out], `down_proj_scale` [experts, out, 1]; a square one is a trap."""
    codes = gaussian(2, 8, 8).to(torch.float8_e4m3fn)
    scale = gaussian(2, 8, 1, seed=1).abs()
    expected = codes.float() * scale.reshape(2, 1, 8)
    name = "layers.0.feed_forward.experts.down_proj"
    check(opened({name: codes, f"{name}_scale": scale}, {"quant_method": "fbgemm_fp8"}), name, expected)


# 4-bit floats


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(110, 135, (3, 10, 4), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    checkpoint = opened({f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"})
    assert expected.shape == (3, 128, 10)
    check(checkpoint, name, expected)
    assert f"{name}_blocks" not in checkpoint.tensors
    assert f"{name}_scales" in checkpoint.tensors


def test_an_expert_of_mxfp4_is_read_without_the_others() -> None:
    blocks = torch.randint(0, 256, (5, 6, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (5, 6, 2), dtype=torch.uint8)
    inner = from_state_dict({"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales})
    seen: list[tuple[str, int, int]] = []
    whole = type(inner).read_rows

    def spy(name: str, start: int, stop: int) -> torch.Tensor:
        seen.append((name, start, stop))
        return whole(inner, name, start, stop)

    inner.read_rows = spy  # type: ignore[method-assign]
    inner.read = lambda name: pytest.fail(f"read whole: {name}")  # type: ignore[method-assign]
    outer = dequantized(inner)
    inner.__dict__.pop("read")
    expected = outer.read("experts.down_proj")[2:3]
    seen.clear()
    assert torch.equal(outer.read_rows("experts.down_proj", 2, 3), expected)
    assert {(start, stop) for _, start, stop in seen} == {(2, 3)}


def float4(packed: torch.Tensor) -> torch.Tensor:
    """Byte by byte, the low nibble first."""
    rows = []
    for row in packed.view(torch.uint8).tolist():
        codes = [code for byte in row for code in (byte % 16, byte // 16)]
        rows.append([E2M1[code % 8] * (-1 if code >= 8 else 1) for code in codes])
    return torch.tensor(rows)


@pytest.mark.parametrize("maker", ["compressed-tensors", "modelopt"])
def test_nvfp4(maker: str) -> None:
    packed = torch.randint(0, 256, (6, 32), dtype=torch.uint8)
    scale = (gaussian(6, 4).abs() + 0.5).to(torch.float8_e4m3fn)
    whole = torch.tensor([2.5])
    if maker == "modelopt":
        tensors = {"q.weight": packed, "q.weight_scale": scale, "q.weight_scale_2": whole.reshape(())}
    else:
        tensors = {"q.weight_packed": packed, "q.weight_scale": scale, "q.weight_global_scale": whole}
    factor = whole.item() if maker == "modelopt" else 1 / whole.item()
    expected = float4(packed) * scale.float().repeat_interleave(16, dim=1) * factor
    check(opened(tensors), "q.weight", expected)


@pytest.mark.parametrize(
    "names", [("weight_packed", "weight_scale", torch.uint8), ("weight", "weight_scale_inv", torch.int8)]
)
def test_mxfp4_of_a_linear_layer(names: tuple[str, str, torch.dtype]) -> None:
    """compressed-tensors' `mxfp4-pack-quantized`; DeepSeek-V4's experts, as transformers undoes them."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    packed = torch.randint(0, 256, (6, 32), dtype=torch.uint8)
    exponents = torch.randint(120, 130, (6, 2), dtype=torch.uint8)
    expected = Fp8Dequantize(None)._dequantize_one(packed.view(torch.int8), exponents, torch.float32)
    torch.testing.assert_close(expected, float4(packed) * torch.exp2(exponents - 127.0).repeat_interleave(32, dim=1))
    codes, scale, dtype = names
    tensors = {f"q.{codes}": packed.view(dtype), f"q.{scale}": exponents.view(torch.float8_e8m0fnu)}
    check(opened(tensors), "q.weight", expected)


# Where the parts lie


def test_the_scale_may_be_in_another_shard(tmp_path: Path, write_shards: Callable[..., Path]) -> None:
    codes = gaussian(130, 60).to(torch.float8_e4m3fn)
    scale = gaussian(2, 1).abs()
    index = write_shards(tmp_path, {"q.weight": codes, "q.weight_scale_inv": scale}, count=2)
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    )
    stored = open_file(index)
    assert stored.tensors["q.weight"].file != stored.tensors["q.weight_scale_inv"].file
    checkpoint = dequantized(stored)
    check(checkpoint, "q.weight", blockwise(codes, scale, 128, 128))
    assert checkpoint.files == stored.files
    assert checkpoint.config == stored.config


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.model.layers.0.", "a.b._checkpoint_wrapped_module."])
def test_prefixes_of_wrappers(prefix: str) -> None:
    codes = torch.randint(-127, 128, (4, 8), dtype=torch.int8)
    absmax = gaussian(4).abs()
    checkpoint = opened({f"{prefix}weight": codes, f"{prefix}SCB": absmax})
    check(checkpoint, f"{prefix}weight", codes.float() * (absmax / 127).unsqueeze(1))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_rounding_to_codes_and_back_is_within_half_a_step(data: st.DataObject) -> None:
    """Packed 4-bit integers of any shape, rounded to nearest by scales of groups."""
    rows, groups = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 4))
    size = data.draw(st.sampled_from([16, 32, 64]))
    weight = gaussian(rows, groups * size, seed=data.draw(st.integers(0, 2**20)))
    scale = weight.unflatten(1, (groups, size)).abs().amax(dim=-1) / 7
    spread = scale.repeat_interleave(size, dim=1)
    codes = (weight / spread).round().long() + 8
    tensors = {
        "q.weight_packed": pack_rows(codes, 4),
        "q.weight_scale": scale,
        "q.weight_shape": torch.tensor(weight.shape),
    }
    read = opened(tensors).read("q.weight")
    assert bool(((read - weight).abs() <= spread * (0.5 + 1e-5)).all())
    assert math.prod(read.shape) == weight.numel()
