"""What cannot be de-quantised for certain keeps its codes, is never scored, and is spoken of."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from esdtool.checkpoint.base import Checkpoint
from esdtool.checkpoint.memory import from_state_dict
from esdtool.checkpoint.quantized.wrapper import dequantized
from esdtool.errors import CheckpointError
from esdtool.modules.classify import Classifier
from esdtool.modules.rules import Skip

TensorDict = dict[str, torch.Tensor]


def opened(tensors: TensorDict, config: dict[str, Any] | None = None) -> Checkpoint:
    return dequantized(from_state_dict(tensors, config={} if config is None else {"quantization_config": config}))


def scored(checkpoint: Checkpoint) -> list[str]:
    """Names of the tensors that would be taken for weights."""
    classifier = Classifier(checkpoint.tensors.values(), checkpoint.config)
    return [name for name, info in checkpoint.tensors.items() if not isinstance(classifier.verdict(info), Skip)]


def int32(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int32)


def fp8(*shape: int) -> torch.Tensor:
    return torch.ones(shape).to(torch.float8_e4m3fn)


GPTQ = {"q.qweight": int32(8, 32), "q.qzeros": int32(2, 4), "q.scales": torch.ones(2, 32)}
PACKED = {"q.weight_packed": int32(4, 8), "q.weight_scale": torch.ones(4, 2), "q.weight_shape": torch.tensor([4, 64])}
MXFP4 = {
    "experts.down_proj_blocks": torch.zeros(2, 4, 2, 16, dtype=torch.uint8),
    "experts.down_proj_scales": torch.zeros(2, 4, 2, dtype=torch.uint8),
}


def but(tensors: TensorDict, drop: str | None = None, **changed: torch.Tensor) -> TensorDict:
    renamed = {key.replace("__", "."): value for key, value in changed.items()}
    return {name: value for name, value in (tensors | renamed).items() if name != drop}


BROKEN: dict[str, tuple[TensorDict, dict[str, Any]]] = {
    "gptq without scales": (but(GPTQ, "q.scales"), {}),
    "gptq without zeros": (but(GPTQ, "q.qzeros"), {}),
    "gptq of 5 bits": (but(GPTQ, q__qzeros=int32(2, 5)), {}),
    "gptq with zeros of other groups": (but(GPTQ, q__qzeros=int32(3, 4)), {}),
    "gptq with an index of another length": (but(GPTQ, q__g_idx=int32(63)), {}),
    "gptq in marlin's layout": (GPTQ, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}),
    "awq in the gemv layout": (
        {"q.qweight": int32(32, 8), "q.qzeros": int32(32, 1), "q.scales": torch.ones(32, 8)},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
    ),
    "packed without scale": (but(PACKED, "q.weight_scale"), {}),
    "packed of 3 bits": (but(PACKED, q__weight_packed=int32(4, 6)), {}),
    "packed with another shape": (but(PACKED, q__weight_shape=torch.tensor([5, 64])), {}),
    "packed with a shape of three": (but(PACKED, q__weight_shape=torch.tensor([1, 4, 64])), {}),
    "packed with scales of other rows": (but(PACKED, q__weight_scale=torch.ones(3, 2)), {}),
    "mxfp4 without scales": (but(MXFP4, "experts.down_proj_scales"), {"quant_method": "mxfp4"}),
    "mxfp4 with other scales": (
        but(MXFP4, experts__down_proj_scales=torch.zeros(2, 4, 3, dtype=torch.uint8)),
        {"quant_method": "mxfp4"},
    ),
    "nvfp4 without a scale of the whole": (
        {"q.weight_packed": torch.zeros(4, 16, dtype=torch.uint8), "q.weight_scale": fp8(4, 2)},
        {},
    ),
    "fp8 with a scale that does not fit": ({"q.weight": fp8(256, 256), "q.weight_scale_inv": torch.ones(3, 5)}, {}),
    "fp8 of fused rows, each part with its scale": (
        {"qkv.weight": fp8(48, 200), "qkv.weight_scale": torch.ones(3)},
        {},
    ),
    "fp8 without its scale": ({"q.weight": fp8(256, 256)}, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "fp8 without its scale, where others have theirs": (
        {"q.weight": fp8(256, 256), "k.weight": fp8(256, 256), "k.weight_scale_inv": torch.ones(2, 2)},
        {},
    ),
    "fp8 experts with scales that do not fit": (
        {"experts.gate_up_proj": fp8(2, 64, 64), "experts.gate_up_proj_scale_inv": torch.ones(2, 5, 7)},
        {},
    ),
    "int8 without a scale": ({"q.weight": torch.ones(8, 8, dtype=torch.int8)}, {"quant_method": "x"}),
    "int8 with another SCB": ({"q.weight": torch.ones(8, 8, dtype=torch.int8), "q.SCB": torch.ones(7)}, {}),
    "eetq, square": (
        {"q.weight": torch.ones(8, 8, dtype=torch.int8), "q.weight_scales": torch.ones(8).half()},
        {"quant_method": "eetq"},
    ),
    "bitnet": (
        {"q.weight": torch.ones(2, 8, dtype=torch.uint8), "q.weight_scale": torch.ones(1).bfloat16()},
        {"quant_method": "bitnet"},
    ),
    "hqq": (
        {"q.W_q": torch.ones(8, 8, dtype=torch.uint8), "q.scale": torch.ones(8, 1), "q.zero": torch.ones(8, 1)},
        {},
    ),
    "aqlm": ({"q.codes": torch.ones(8, 8, 1, dtype=torch.int16), "q.codebooks": torch.ones(1, 16, 1, 8)}, {}),
    "quanto": ({"q.weight._data": torch.ones(8, 8, dtype=torch.int8), "q.weight._scale": torch.ones(8, 1)}, {}),
    "torchao": ({"q._weight_qdata": torch.ones(8, 8, dtype=torch.int8), "q._weight_scale": torch.ones(8, 1)}, {}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_codes_are_never_given_out_as_weights(case: str) -> None:
    tensors, config = BROKEN[case]
    checkpoint = opened(tensors, config)
    kept = [name for name in checkpoint.tensors if name != "k.weight"]
    assert [name for name in scored(checkpoint) if name in kept] == []
    assert all(checkpoint.tensors[name].quantization is None for name in kept)
    assert set(checkpoint.tensors) == set(tensors)


@pytest.mark.parametrize("case", BROKEN)
def test_a_note_names_the_tensor(case: str) -> None:
    tensors, config = BROKEN[case]
    module = "experts" if any("experts" in name for name in tensors) else next(iter(tensors)).split(".")[0]
    assert any(module in note for note in opened(tensors, config).notes)


@pytest.mark.parametrize(
    "blob",
    [
        b"no json",
        b"[]",
        b"{}",
        b'{"shape": [8, 8]}',
        b'{"shape": [8, -8], "blocksize": 64}',
        b'{"shape": [8, 9], "blocksize": 64}',
        b'{"shape": [8, 8], "blocksize": 0}',
        b'{"shape": 8, "blocksize": 64}',
        b'{"shape": [8, 8], "blocksize": 64, "nested_offset": 1.0, "nested_blocksize": 256}',
        b'{"shape": [8, 8], "blocksize": 64, "nested_offset": "x", "nested_blocksize": 256}',
        b"\xff\xfe",
    ],
)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_damaged_quant_state(blob: bytes, storage: torch.dtype) -> None:
    tensors = {
        "q.weight": torch.zeros(32, 1, dtype=torch.uint8).view(storage)
        if storage == torch.uint8
        else torch.zeros(16, 1, dtype=storage),
        "q.weight.absmax": torch.ones(1),
        "q.weight.quant_map": torch.ones(16),
        "q.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(blob), dtype=torch.uint8),
    }
    checkpoint = opened(tensors)
    assert scored(checkpoint) == []
    assert set(checkpoint.tensors) == set(tensors)
    assert any("q.weight" in note for note in checkpoint.notes)


def test_groups_out_of_range_are_an_error_in_one_line() -> None:
    tensors = {
        "q.qweight": int32(8, 32),
        "q.qzeros": int32(2, 4),
        "q.scales": torch.ones(2, 32),
        "q.g_idx": torch.full((64,), 7, dtype=torch.int32),
    }
    checkpoint = opened(tensors, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"q\.g_idx") as caught:
        checkpoint.read("q.weight")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": None},
        {"quantization_config": "gptq"},
        {"quantization_config": {"bits": None, "group_size": None, "quant_method": 4, "weight_block_size": "x"}},
        {"quantization_config": {"bits": "4", "weight_block_size": [128], "config_groups": [1]}},
        {"quantization_config": {"bits": 4, "weight_block_size": [0, -1], "config_groups": {"a": None}}},
    ],
)
def test_odd_configurations_break_nothing(config: dict[str, Any]) -> None:
    tensors = {"a.weight": fp8(256, 256), "a.weight_scale_inv": torch.ones(2, 2), **GPTQ}
    checkpoint = dequantized(from_state_dict(tensors, config=json.loads(json.dumps(config))))
    assert torch.equal(checkpoint.read("a.weight"), torch.ones(256, 256))


def test_a_checkpoint_without_codes_is_returned_as_it_is() -> None:
    plain = from_state_dict({"q.weight": torch.ones(4, 4), "n.weight": torch.ones(4), "ids": torch.arange(4)})
    assert dequantized(plain) is plain


def test_weights_cast_to_fp8_without_scales_are_weights() -> None:
    plain = from_state_dict({"q.weight": fp8(4, 4), "k.weight": fp8(4, 4)})
    assert dequantized(plain) is plain


def test_a_weight_beside_its_codes_is_kept() -> None:
    tensors = {**GPTQ, "q.weight": torch.full((32, 64), 3.0)}
    checkpoint = opened(tensors, {"quant_method": "gptq", "bits": 4})
    assert torch.equal(checkpoint.read("q.weight"), torch.full((32, 64), 3.0))
