"""De-quantisation against the libraries that define the formats, or against loops written from their documentation."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esdtool.checkpoint.base import Checkpoint
from esdtool.checkpoint.local import open_file
from esdtool.checkpoint.memory import from_state_dict
from esdtool.checkpoint.quantized.wrapper import dequantized

TensorDict = dict[str, torch.Tensor]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def opened(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Checkpoint:
    settings_ = None if config is None else {"quantization_config": config}
    return dequantized(from_state_dict(tensors, config=settings_))


def check(checkpoint: Checkpoint, name: str, expected: torch.Tensor, *, tolerance: float = 1e-6) -> None:
    """Catalogue, values and every way to read rows."""
    info = checkpoint.info(name)
    assert info.shape == tuple(expected.shape)
    assert info.dtype == "float32"
    assert info.quantization
    assert info.roundoff is not None
    assert 0 < info.roundoff < 1
    read = checkpoint.read(name)
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, expected.float(), rtol=tolerance, atol=0)
    last = read.shape[0]
    for start, stop in ((0, last), (0, 1), (last // 3, last // 2 + 1), (last - 1, last), (1, 1)):
        assert torch.equal(checkpoint.read_rows(name, start, stop), read[start:stop])


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


# bitsandbytes


@pytest.fixture(scope="module")
def bitsandbytes() -> Any:
    with warnings.catch_warnings():
        # On import it looks for GPU libraries and optional kernels, and warns where there are none.
        warnings.simplefilter("ignore")
        import bitsandbytes

        return bitsandbytes


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize(("shape", "block"), [((48, 64), 64), ((300, 256), 64), ((6, 50), 64), ((10, 96), 128)])
def test_four_bits_of_bitsandbytes(
    bitsandbytes: Any, kind: str, nested: bool, storage: torch.dtype, shape: tuple[int, int], block: int
) -> None:
    functional = bitsandbytes.functional
    weight = gaussian(*shape)
    packed, state = functional.quantize_4bit(
        weight, blocksize=block, quant_type=kind, compress_statistics=nested, quant_storage=storage
    )
    absmax = state.absmax
    if nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = [code for byte in packed.view(torch.uint8).flatten().tolist() for code in (byte >> 4, byte & 15)]
    values = [float(state.code[code]) * float(absmax[i // block]) for i, code in enumerate(codes[: weight.numel()])]
    expected = torch.tensor(values).reshape(shape)
    # The library's CPU kernel (0.50.2) takes the wrong block where a row is no multiple of it: the result is then
    # three times as far from the weight as the loop's. Elsewhere the two agree.
    assert (expected - weight).norm() < 0.2 * weight.norm()
    if shape[1] % block == 0:
        torch.testing.assert_close(expected, functional.dequantize_4bit(packed, state), rtol=1e-5, atol=1e-7)
    tensors = {"q.weight": packed}
    tensors |= {f"q.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    check(opened(tensors), "q.weight", expected, tolerance=1e-5)


def test_int8_of_bitsandbytes(bitsandbytes: Any) -> None:
    codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(gaussian(12, 40).half())
    expected = bitsandbytes.functional.int8_vectorwise_dequant(codes, absmax)
    tensors = {"q.weight": codes, "q.SCB": absmax, "q.weight_format": torch.tensor(0, dtype=torch.uint8)}
    check(opened(tensors), "q.weight", expected)


# GPTQ and AWQ


def pack_stream(codes: list[int], bits: int) -> list[int]:
    """Codes one after the other in a stream of bits, cut into signed words of 32."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def pack_columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, m] codes -> [n * bits / 32, m]."""
    return torch.tensor([pack_stream(column, bits) for column in codes.T.tolist()], dtype=torch.int32).T.contiguous()


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.tensor([pack_stream(row, bits) for row in codes.tolist()], dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ["groups", "activation", "none"])
def test_gptq(bits: int, version: str, order: str) -> None:
    inputs, outputs, groups = 96, 32, 3
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (inputs, outputs), generator=random)
    zeros = torch.randint(1, 2**bits, (groups, outputs), generator=random)
    scales = (gaussian(groups, outputs).abs() + 0.01).half()
    index = torch.arange(inputs) // 32
    if order == "activation":
        index = index[torch.randperm(inputs, generator=random)]
    expected = torch.empty(outputs, inputs)
    for i in range(inputs):
        g = index[i]
        for o in range(outputs):
            expected[o, i] = scales[g, o].float() * (codes[i, o] - zeros[g, o])
    tensors = {
        "q.qweight": pack_columns(codes, bits),
        "q.qzeros": pack_rows(zeros - int(version == "gptq"), bits),
        "q.scales": scales,
        "q.g_idx": index.to(torch.int32),
    }
    if order == "none":
        del tensors["q.g_idx"]
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": version}
    checkpoint = opened(tensors, config)
    check(checkpoint, "q.weight", expected)
    assert "q.qweight" not in checkpoint.tensors
    assert {"q.qzeros", "q.scales"} <= set(checkpoint.tensors)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_point_of_zero_wraps_in_version_1(bits: int) -> None:
    """GPTQModel stores (zero - 1) modulo 2^bits."""
    codes = torch.randint(0, 2**bits, (32, 32))
    zeros = torch.zeros(1, 32, dtype=torch.long)
    tensors = {
        "q.qweight": pack_columns(codes, bits),
        "q.qzeros": pack_rows((zeros - 1) % 2**bits, bits),
        "q.scales": torch.ones(1, 32).half(),
        "q.g_idx": torch.zeros(32, dtype=torch.int32),
    }
    check(opened(tensors, {"quant_method": "gptq", "bits": bits}), "q.weight", codes.T.float())


def test_awq() -> None:
    """AutoAWQ packs the outputs 0 2 4 6 1 3 5 7 of each eight from the lowest bits upwards."""
    inputs, outputs, group = 64, 24, 32
    codes = torch.randint(0, 16, (inputs, outputs))
    zeros = torch.randint(0, 16, (inputs // group, outputs))
    scales = (gaussian(inputs // group, outputs).abs() + 0.01).half()

    def pack(values: torch.Tensor) -> torch.Tensor:
        order = [8 * word + lane for word in range(outputs // 8) for lane in (0, 2, 4, 6, 1, 3, 5, 7)]
        return pack_rows(values[:, order], 4)

    expected = torch.empty(outputs, inputs)
    for i in range(inputs):
        for o in range(outputs):
            expected[o, i] = scales[i // group, o].float() * (codes[i, o] - zeros[i // group, o])
    tensors = {"q.qweight": pack(codes), "q.qzeros": pack(zeros), "q.scales": scales}
    check(opened(tensors, {"quant_method": "awq", "bits": 4, "version": "gemm"}), "q.weight", expected)


# compressed-tensors


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_integers_of_compressed_tensors(bits: int, strategy: str, symmetric: bool) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    if strategy == "tensor" and not symmetric:
        pytest.skip("the library packs zero points of groups and channels only")
    group = 32 if strategy == "group" else None
    weights = QuantizationArgs(num_bits=bits, strategy=strategy, group_size=group, symmetric=symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    count = {"group": (20, 3), "channel": (20, 1), "tensor": (1,)}[strategy]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    state = {
        "weight": gaussian(20, 96),
        "weight_scale": gaussian(*count, seed=1).abs() + 0.1,
        "weight_zero_point": torch.zeros(*count, dtype=torch.int8)
        if symmetric
        else torch.randint(low, high, count, dtype=torch.int8),
    }
    packed = PackedQuantizationCompressor.compress(state, scheme)
    expected = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights.model_dump(mode="json")}},
    }
    check(opened({f"q.{key}": value for key, value in packed.items()}, config), "q.weight", expected)
    check(opened({f"q.{key}": value for key, value in packed.items()}), "q.weight", expected)


def test_packed_integers_in_the_order_of_activations() -> None:
    codes = torch.randint(0, 16, (6, 64))
    index = torch.arange(64) % 2
    scale = gaussian(6, 2).abs()
    tensors = {
        "q.weight_packed": pack_rows(codes, 4),
        "q.weight_scale": scale,
        "q.weight_shape": torch.tensor([6, 64]),
        "q.weight_g_idx": index.to(torch.int32),
    }
    check(opened(tensors), "q.weight", (codes - 8).float() * scale[:, index])


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
